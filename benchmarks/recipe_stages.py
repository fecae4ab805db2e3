"""What the stages of the paper's recipe are worth, in miniature on the bundled pictures, at equal training time an arm.

    python benchmarks/recipe_stages.py             # about eight minutes on one H100
    python benchmarks/recipe_stages.py --tiny                # a few steps on a CPU, to see that it runs

Arms: captions at 256 px from nothing; a class-conditional DiT at 256 px first (pixel dependency), then captions from
it; captions at 128 px first, then 256 px from them, with the position scale of the original (1) and interpolated (2).
The first stage of an arm has SHARE of the time. A short run of every stage says how many steps fit. Results: validation
loss at 256 px, and retrieval of what the averaged weights draw (see docs/bundled-model.md). docs/recipe.md shows them.
They are written after every arm, and arms of this budget that the output file holds are kept: a call can be repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from ablation_emoji import PARTS, draw, kept_arms
from report import write_report

from diffusion.errors import run_cli

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
PROBE_STEPS = 60


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=75, help="training time of an arm (default: %(default)s)")
    add("--share", type=float, default=0.4, help="of the time for an arm's first stage (default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every stage")
    add("--limit", type=int, default=220, help="captions drawn a split (default: %(default)s)")
    add("--bs", type=int, default=128, help="pictures drawn at a time (default: %(default)s)")
    add("--sampling-steps", type=int, default=20, help="solver steps (default: %(default)s)")
    add("--tiny", action="store_true", help="a very small network, 40 pictures, three steps a stage")
    add("--work-dir", type=Path, default=Path("output/recipe-stages"))
    add("--output", type=Path, default=Path("benchmarks/results/recipe_stages.json"))
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.tiny:
        args.cfg_options = [*TINY, *args.cfg_options]
        args.limit, args.sampling_steps, args.bs = 2, 2, 2
    stores = {f"store{size}": features(args, size) for size in (128, 256)}
    budget = {"seconds": args.seconds, "share_of_first_stage": args.share, "tiny": args.tiny}
    kept = kept_arms(args.output, budget)
    rows: dict[str, Any] = kept.get("arms", {})
    speeds: dict[str, float] = kept.get("images_per_s", {})
    for name in args.arms:
        if name in rows:
            continue
        rows[name] = run_arm(args, name, stores, speeds)
        figures = {"benchmark": "stages of the recipe, equal training time an arm", **budget}
        write_report(args.output, {**figures, "images_per_s": speeds, "arms": rows})


def features(args: argparse.Namespace, size: int) -> Path:
    """The store of the bundled pictures at a size; extracted if it is not there."""
    from diffusion.features import ExtractionSettings, extract_folder

    store = args.work_dir / f"features-{size}" if args.tiny else Path(f"output/features/emoji-{size}")
    if not (store / "manifest.json").is_file():
        settings = ExtractionSettings(image_size=size, dtype="fp32" if args.tiny else "bf16")
        extract_folder("data/emoji", store, PARTS, settings, limit=40 if args.tiny else None)
    return store


def run_arm(args: argparse.Namespace, name: str, stores: dict[str, Path], speeds: dict[str, float]) -> dict[str, Any]:
    """Train the stages of an arm, each from the one before, and draw with the last."""
    stages = ARMS[name]
    shares = [1.0] if len(stages) == 1 else [args.share, 1 - args.share]
    start: Path | None = None
    row: dict[str, Any] = {"steps": []}
    for number, ((config, options), share) in enumerate(zip(stages, shares), start=1):
        chosen = [option.format(**stores) for option in options] + args.cfg_options
        key = f"{config} {chosen[0]}"
        if key not in speeds:
            options = [f"max_steps={4 if args.tiny else PROBE_STEPS}", f"log_interval={1 if args.tiny else 10}"]
            metrics = train(args, "probe", config, [*chosen, *options], None)
            rates = [line["images_per_s"] for line in metrics if "images_per_s" in line]  # the last may only validate
            speeds[key] = round(statistics.harmonic_mean(rates[2:]), 1)
        steps = 3 if args.tiny else round(share * args.seconds * speeds[key] / batch_size(config, chosen))
        folder = f"{name}-{number}".replace(" ", "-").replace(",", "")
        options = [*chosen, f"max_steps={steps}", f"save_model_steps={steps}", f"validation.every_steps={steps}"]
        metrics = train(args, folder, config, options, start)
        start = args.work_dir / folder / "checkpoints" / f"checkpoint-{steps}"
        row["steps"].append(steps)
    assert start is not None
    row["validation_loss"] = metrics[-1]["validation_loss"]
    return {**row, **draw(args, start)}


def train(
    args: argparse.Namespace, folder: str, config: str, options: list[str], start: Path | None
) -> list[dict[str, Any]]:
    """One run in this process; returns the lines of its metrics."""
    from diffusion.config import load_config
    from diffusion.training import Reporting, Trainer, denoising_objective

    work_dir = args.work_dir / folder
    shutil.rmtree(work_dir, ignore_errors=True)
    common = ["validation.prompts=[]", "data_root=.", f"load_from={str(start) if start else None!r}"]
    loaded = load_config(FOLDER / config, [*options, *common])
    Trainer(loaded, denoising_objective, work_dir, reporting=Reporting(tensorboard=False)).fit()
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def batch_size(config: str, options: list[str]) -> int:
    from diffusion.config import load_config

    loaded = load_config(FOLDER / config, [*options, "validation.prompts=[]"], notify=lambda line: None)
    return loaded.train_batch_size * loaded.gradient_accumulation_steps


if __name__ == "__main__":
    run_cli(main)
