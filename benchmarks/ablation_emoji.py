"""Which choices make the emoji model better: equal time (steps, FLOPs) an arm, validation loss and retrieval of each.

    python tools/add_captions.py data/emoji --output build/emoji-captions --captions 16
    python tools/extract_features.py build/emoji-captions --out output/features/emoji-captions
    python benchmarks/ablation_emoji.py --seconds 90

The arms with REPA need features of a picture encoder, here the stand-in that the data set itself trains:

    python train_scripts/train_alignment_encoder.py --data data/emoji --output output/alignment-encoder
    python tools/extract_alignment.py output/features/emoji-captions --encoder output/alignment-encoder \
        --out output/features/emoji-alignment

An arm is configs/emoji/emoji_256.py with overrides. Validation losses of arms that predict something else (velocity,
flow) are not comparable; retrieval is. A short run says how many steps fit into the time; arms that change
the speed (size, batch, optimiser) have a short run of their own. In a network this small less arithmetic hardly saves
time (launches, routing and data stay): --equal_flops counts work instead, see `step_flops`. Results are written
after every arm, and arms that the output file holds are kept, so a call can be repeated until all are there.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flops import forward_flops
from report import write_report

from diffusion.errors import PixArtError, run_cli

CONFIG = "configs/emoji/emoji_256.py"
PARTS = "output/pretrained_models/emoji-256"
NOISE = ["process.prediction_type=epsilon"]
FLOW = ["process.prediction_type=flow", "pred_sigma=False"]
REPA = ["repa.features='output/features/emoji-alignment'", "repa.block=4", "repa.head_width=512"]
ARMS: dict[str, list[str]] = {
    "base": [],
    "unbalanced": ["data.balance_by=None"],
    "no variance": ["pred_sigma=False"],
    "min-SNR": ["process.min_snr_gamma=5.0"],
    "uniform timesteps": ["process.timestep_sampling=uniform"],
    "logit-normal": ["process.timestep_sampling=logit_normal"],  # for --cfg-options process.timestep_sampling=uniform
    "noise": [*NOISE],
    "noise, min-SNR": [*NOISE, "process.min_snr_gamma=5.0"],
    "flow": [*FLOW],
    "flow, logit-normal": [*FLOW, "process.timestep_sampling=logit_normal"],
    "caption dropout 0.05": ["class_dropout_prob=0.05"],
    "caption dropout 0.2": ["class_dropout_prob=0.2"],
    "labels only": ["data.max_captions=1"],
    "four captions": ["data.max_captions=4"],
    "constant lr": ["lr_schedule=constant"],
    "narrow and deep": ["hidden_size=192", "depth=18", "num_heads=3"],
    "wide and shallow": ["hidden_size=320", "depth=6", "num_heads=5"],
    "batch 256": ["train_batch_size=256", "optimizer.lr=2e-3"],
    "batch 1024": ["train_batch_size=1024", "optimizer.lr=4.5e-3"],
    "lr 1.5e-3": ["optimizer.lr=1.5e-3"],
    "lr 6e-3": ["optimizer.lr=6e-3"],
    "AdamW": ["optimizer.type=AdamW", "optimizer.lr=1.2e-3"],
    "AdamW, noise, min-SNR": [*NOISE, "process.min_snr_gamma=5.0", "optimizer.type=AdamW", "optimizer.lr=1.2e-3"],
    "TREAD": ["tread.first_block=2", "tread.last_block=7"],
    "TREAD, ended": ["tread.first_block=2", "tread.last_block=7", "tread.until_step={90%}"],
    "REPA": [*REPA],
    "REPA, ended": [*REPA, "repa.until_step={33%}"],
    "REPA and TREAD": [*REPA, "repa.until_step={33%}", "tread.first_block=2", "tread.last_block=7"],
}
CHANGES_SPEED = ("hidden_size", "depth", "num_heads", "train_batch_size", "optimizer.type", "tread", "repa")
POSTHOC_SIGMA_RELS = (0.02, 0.05, 0.10, 0.15, 0.20)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=90, help="training time of an arm (default: %(default)s)")
    add("--steps", type=int, help="optimiser steps of every arm, instead of --seconds")
    add("--equal_flops", action="store_true", help="--steps are those of 'base'; others get as many as cost the same")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}")
    add("--features", default="output/features/emoji-captions", help="feature store (default: %(default)s)")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every arm")
    add("--stop-after", type=float, help="seconds of this call after which no further arm is begun")
    add("--posthoc", action="store_true", help="also draw averages of other lengths of the arm 'base'")
    add("--limit", type=int, default=220, help="captions drawn a split (default: %(default)s)")
    add("--bs", type=int, default=128, help="pictures drawn at a time (default: %(default)s)")
    add("--sampling-steps", type=int, default=20, help="solver steps (default: %(default)s)")
    add("--work-dir", type=Path, default=Path("output/ablation"))
    add("--output", type=Path, default=Path("benchmarks/results/ablation_emoji.json"))
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.equal_flops and not args.steps:
        raise PixArtError("--equal_flops needs --steps, those of the arm 'base'")
    size = f"{args.steps} steps" if args.steps else f"{args.seconds:g} s of training"
    size += " of 'base', or as many as cost the same FLOPs," if args.equal_flops else ""
    title = {"benchmark": f"{CONFIG}, {size} an arm"}
    rows: dict[str, Any] = kept_arms(args.output, title).get("arms", {})
    begun = time.monotonic()
    common = None if args.steps else steps_in(args, args.seconds, [])
    for name in args.arms:
        if name in rows:
            continue
        if args.stop_after is not None and time.monotonic() - begun > args.stop_after:
            print(f"no time for {name}; call again")
            continue
        own = any(option.startswith(CHANGES_SPEED) for option in ARMS[name])
        steps = args.steps or (steps_in(args, args.seconds, ARMS[name]) if own else common)
        if args.equal_flops:
            base, own_flops = (step_flops(overrides, args.cfg_options) for overrides in (ARMS["base"], ARMS[name]))
            steps = round(args.steps * base / own_flops)
        rows[name] = measure(args, name, steps, posthoc=args.posthoc and name == "base")
        write_report(args.output, {**title, "arms": rows})


def kept_arms(output: Path, budget: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has written; {} if there is nothing.

    Raises:
        PixArtError: it was measured with another budget.
    """
    if not output.is_file():
        return {}
    kept: dict[str, Any] = json.loads(output.read_text())
    if other := [f"{key} {kept.get(key)!r}, not {value!r}" for key, value in budget.items() if kept.get(key) != value]:
        raise PixArtError(f"{output} holds arms of {'; '.join(other)}: move it away, or name another --output")
    return kept


def train(args: argparse.Namespace, work_dir: Path, options: list[str]) -> list[dict[str, Any]]:
    """Run the training program anew; returns the lines of its metrics."""
    shutil.rmtree(work_dir, ignore_errors=True)
    command = [sys.executable, "train_scripts/train.py", CONFIG, "--work-dir", str(work_dir), "--report_to", "none"]
    common = [f"data.root={args.features}", "validation.prompts=[]", "validation.at_start=False"]
    subprocess.run([*command, "--cfg-options", *common, *args.cfg_options, *options], check=True)
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def steps_in(args: argparse.Namespace, seconds: float, overrides: list[str], probe_steps: int = 120) -> int:
    """Optimiser steps that fit into a time, from the median speed of a short run."""
    options = [f"max_steps={probe_steps}", "log_interval=10", "validation.num_samples=0"]
    options += at_share(overrides, probe_steps)
    metrics = train(args, args.work_dir / "probe", options)
    config = json.loads((args.work_dir / "probe" / "config.json").read_text())
    batch = config["train_batch_size"] * config["gradient_accumulation_steps"]
    # Steps that differ in speed (a lever that ends) count as long as they take.
    return round(seconds * statistics.harmonic_mean([row["images_per_s"] for row in metrics[2:]]) / batch)


def at_share(overrides: list[str], steps: int) -> list[str]:
    """Overrides with `{33%}` and its like replaced by that share of the steps."""
    return [re.sub(r"\{(\d+)%\}", lambda match: str(max(1, steps * int(match[1]) // 100)), one) for one in overrides]


def step_flops(overrides: list[str], common: list[str]) -> float:
    """FLOPs of an optimiser step's forward passes, on average over a run.

    Tokens that TREAD routes around a block cost it nothing there. REPA's head costs two FLOPs a weight and token; the
    encoder's features, which are made once, are not counted.
    """
    from diffusion.config import load_config
    from diffusion.models.alignment import AlignmentHead
    from diffusion.models.routing import kept_tokens
    from diffusion.training.building import model_options
    from diffusion.training.levers import alignment_head, objective_kind
    from diffusion.training.starting import new_network

    run = 1000  # steps, of which a lever that ends has its share
    options = ["validation.prompts=[]", *common, *at_share(overrides, run)]
    config = load_config(CONFIG, options, notify=lambda line: None)
    with torch.device("meta"):
        net = new_network(config.model, model_options(config)).config
        head = AlignmentHead(net.hidden_size, *alignment_head(config)) if config.repa else None
    batch = config.train_batch_size * config.gradient_accumulation_steps
    tokens, text = net.base_size**2, config.model_max_length
    flops = float(forward_flops(net, tokens, text))
    levers = objective_kind(config)[1]

    def share_of_run(lever: Any) -> float:
        return 1.0 if lever.until_number is None else lever.until_number / (run * batch)

    if routing := levers["routing"]:
        kept = kept_tokens(torch.zeros(1, tokens), routing.share).shape[1]
        none, blocks = (replace(net, depth=depth) for depth in (0, routing.last - routing.first + 1))
        whole, routed = (forward_flops(blocks, n, text) - forward_flops(none, n, text) for n in (tokens, kept))
        flops -= share_of_run(routing) * (whole - routed)
    if head is not None:
        weights = sum(parameter.numel() for parameter in head.parameters() if parameter.ndim > 1)
        flops += share_of_run(levers["alignment"]) * 2 * weights * tokens
    return batch * flops


def measure(args: argparse.Namespace, name: str, steps: int, *, posthoc: bool) -> dict[str, Any]:
    """Train one arm and draw with its averaged weights; with `posthoc` also with averages of other lengths."""
    work_dir = args.work_dir / name.replace(" ", "-")
    options = [f"max_steps={steps}", f"validation.every_steps={steps}", f"save_model_steps={steps}"]
    options += at_share(ARMS[name], steps)
    if posthoc:
        options.append(f"posthoc_ema.snapshot_every_steps={max(1, steps // 24)}")
    metrics = train(args, work_dir, options)
    row = {
        "overrides": ARMS[name],
        "steps": steps,
        "validation_loss": metrics[-1].get("validation_loss"),
        **draw(args, work_dir / "checkpoints" / f"checkpoint-{steps}"),
    }
    if args.steps is None:  # else the card may be shared with other arms
        row["images_per_s"] = round(statistics.median(m["images_per_s"] for m in metrics if "images_per_s" in m))
    if posthoc:
        row["posthoc"] = {str(sigma_rel): draw_posthoc(args, work_dir, sigma_rel) for sigma_rel in POSTHOC_SIGMA_RELS}
    return row


def draw(args: argparse.Namespace, transformer: Path) -> dict[str, Any]:
    """Retrieval of a transformer on both splits and on the free prompts."""
    from diffusion.devices import choose_device, choose_dtype
    from diffusion.evaluation.drawing import DrawingSettings, evaluate_captions, evaluate_free_prompts
    from diffusion.evaluation.free_prompts import read_free_prompts
    from diffusion.inference import PixArtPipeline

    device = choose_device("auto")
    pipeline = PixArtPipeline.from_pretrained(
        PARTS, transformer=transformer, ema=True, device=device, torch_dtype=choose_dtype("auto", device)
    )
    pipeline.set_progress_bar_config(disable=True)
    gallery = bundled_gallery()
    settings = [DrawingSettings(args.sampling_steps, batch_size=args.bs)]
    outcomes = evaluate_captions(pipeline, gallery, ["heldout", "train"], ["label"], settings, limit=args.limit)
    prompts = read_free_prompts("data/emoji/free_prompts.jsonl")[: args.limit]
    outcomes += evaluate_free_prompts(pipeline, gallery, prompts, settings)
    heldout, train_split, free = (outcome.figures for outcome in outcomes)
    return {
        "heldout_r1": heldout["picture_r1"],
        "heldout_r5": heldout["picture_r5"],
        "train_r1": train_split["picture_r1"],
        "train_r5": train_split["picture_r5"],
        "free_prompts": free["concept_r1"],
        "sharpness": heldout["sharpness"],
    }


@functools.cache
def bundled_gallery() -> Any:
    """All bundled pictures; read once for all arms."""
    from diffusion.evaluation.retrieval import load_gallery

    return load_gallery("data/emoji")


def draw_posthoc(args: argparse.Namespace, work_dir: Path, sigma_rel: float) -> dict[str, Any]:
    """`draw` with the average of another length."""
    from diffusion.training.posthoc_snapshots import reconstruct

    folder = work_dir / f"average-{sigma_rel}"
    made = reconstruct(work_dir, sigma_rel, folder)
    return {"profile_error": round(made.relative_error, 4), **draw(args, folder)}


if __name__ == "__main__":
    run_cli(main)
