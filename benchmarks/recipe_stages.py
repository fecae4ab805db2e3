"""What the stages of the paper's recipe are worth, in miniature on the bundled pictures, at equal FLOPs an arm.

    python benchmarks/recipe_stages.py             # minutes on one GPU
    python benchmarks/recipe_stages.py --tiny      # a few steps on a CPU, to see that it runs

Arms: captions at 256 px from nothing; a class-conditional DiT at 256 px first (pixel dependency), then captions from
it; captions at 128 px first, then 256 px from them, with the position scale of the original (1) and interpolated (2).
The first stage of an arm has SHARE of the work. It is counted, not timed: in a network this small less arithmetic
hardly saves time. Results: validation loss at 256 px, and retrieval of what the averaged weights draw (see
docs/bundled-model.md); docs/recipe.md shows them. They are written after every arm, and arms of this budget that the
output file holds are kept: a call can be repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from ablation_emoji import PARTS, draw, kept_arms
from flops import counted_flops
from report import write_report

from diffusion.config import TrainConfig, load_config
from diffusion.errors import run_cli
from diffusion.features import ExtractionSettings, extract_folder
from diffusion.models import DiT
from diffusion.training import Reporting, Trainer, denoising_objective
from diffusion.training.building import model_options
from diffusion.training.starting import new_network

FOLDER = Path("configs/emoji/recipe")
CLASSES, SMALL, LARGE = ("stage1_classes_128.py", "stage2_captions_128.py", "stage3_captions_256.py")
AT_256 = ["image_size=256", "data.root={store256}"]
AT_128 = ["image_size=128", "data.root={store128}"]
SCALE_1, SCALE_2 = ["lewei_scale=1.0"], ["lewei_scale=2.0"]
# arm -> its stages: (config, options). The last one is measured.
ARMS: dict[str, list[tuple[str, list[str]]]] = {
    "256 px from nothing": [(LARGE, [*AT_256, *SCALE_1])],
    "classes first": [(CLASSES, AT_256), (LARGE, [*AT_256, *SCALE_1])],
    "128 px first, scale 1": [(SMALL, AT_128), (LARGE, [*AT_256, *SCALE_1])],
    "128 px first, scale 2": [(SMALL, AT_128), (LARGE, [*AT_256, *SCALE_2])],
}
TINY = ["hidden_size=64", "depth=2", "num_heads=2", "train_batch_size=4", "num_workers=0", "mixed_precision=no"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="of the first arm; others do the same work (default: %(default)s)")
    add("--share", type=float, default=0.4, help="of the work for an arm's first stage (default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every stage")
    add("--limit", type=int, default=220, help="captions drawn a split (default: %(default)s)")
    add("--bs", type=int, default=128, help="pictures drawn at a time (default: %(default)s)")
    add("--sampling-steps", type=int, default=20, help="solver steps (default: %(default)s)")
    add("--tiny", action="store_true", help="a very small network, 40 pictures, few steps")
    add("--work-dir", type=Path, default=Path("output/recipe-stages"))
    add("--output", type=Path, default=Path("benchmarks/results/recipe_stages.json"))
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.tiny:
        args.cfg_options = [*TINY, *args.cfg_options]
        args.steps, args.limit, args.sampling_steps, args.bs = 6, 2, 2, 2
    stores = {f"store{size}": features(args, size) for size in (128, 256)}
    budget = {"steps": args.steps, "share_of_first_stage": args.share, "tiny": args.tiny}
    rows: dict[str, Any] = kept_arms(args.output, budget).get("arms", {})
    for name in args.arms:
        if name in rows:
            continue
        rows[name] = run_arm(args, name, stores)
        figures = {"benchmark": "stages of the recipe, equal FLOPs an arm", **budget, "arms": rows}
        write_report(args.output, figures)


def features(args: argparse.Namespace, size: int) -> Path:
    """The store of the bundled pictures at a size; extracted if it is not there."""
    store = args.work_dir / f"features-{size}" if args.tiny else Path(f"output/features/emoji-{size}")
    if not (store / "manifest.json").is_file():
        settings = ExtractionSettings(image_size=size, dtype="fp32" if args.tiny else "bf16")
        extract_folder("data/emoji", store, PARTS, settings, limit=40 if args.tiny else None)
    return store


def run_arm(args: argparse.Namespace, name: str, stores: dict[str, Path]) -> dict[str, Any]:
    """Train the stages of an arm, each from the one before, and draw with the last."""
    stages = [(config, [option.format(**stores) for option in options]) for config, options in ARMS[name]]
    shares = [1.0] if len(stages) == 1 else [args.share, 1 - args.share]
    whole = flops_a_picture(args, *stages[-1])
    start: Path | None = None
    row: dict[str, Any] = {"steps": []}
    for number, ((config, options), share) in enumerate(zip(stages, shares), start=1):
        steps = round(share * args.steps * whole / flops_a_picture(args, config, options))
        folder = f"{name}-{number}".replace(" ", "-").replace(",", "")
        ends = [f"max_steps={steps}", f"save_model_steps={steps}", f"validation.every_steps={steps}"]
        metrics = train(args, folder, config, [*options, *ends], start)
        start = args.work_dir / folder / "checkpoints" / f"checkpoint-{steps}"
        row["steps"].append(steps)
    assert start is not None
    row["validation_loss"] = metrics[-1]["validation_loss"]
    return {**row, **draw(args, start)}


def loaded(args: argparse.Namespace, config: str, options: list[str]) -> TrainConfig:
    common = ["validation.prompts=[]", "data_root=."]
    return load_config(FOLDER / config, [*common, *options, *args.cfg_options])


def flops_a_picture(args: argparse.Namespace, config: str, options: list[str]) -> int:
    """Of one pass of the stage's network."""
    stage = loaded(args, config, options)
    network = new_network(stage.model, model_options(stage))
    latents = torch.zeros(1, 4, stage.image_size // 8, stage.image_size // 8)
    if isinstance(network, DiT):
        condition = torch.zeros(1, dtype=torch.long)
    else:
        condition = torch.zeros(1, stage.model_max_length, stage.caption_channels)
    return counted_flops(lambda: network(latents, torch.zeros(1), condition))


def train(
    args: argparse.Namespace, folder: str, config: str, options: list[str], start: Path | None
) -> list[dict[str, Any]]:
    """One run in this process; returns the lines of its metrics."""
    work_dir = args.work_dir / folder
    shutil.rmtree(work_dir, ignore_errors=True)
    stage = loaded(args, config, [*options, f"load_from={str(start) if start else None!r}"])
    Trainer(stage, denoising_objective, work_dir, reporting=Reporting(tensorboard=False)).fit()
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    run_cli(main)
