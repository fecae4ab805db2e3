"""Does FP8 train like bf16? Loss of FP8 runs against the band of several bf16 seeds, on the bundled pictures at 256 px.

    python tools/extract_features.py data/emoji --out output/features/emoji-256
    python benchmarks/fp8_loss_band.py --out benchmarks/results/fp8_loss_band.json
    python benchmarks/fp8_loss_band.py --tiny --features output/features/emoji-demo --out /tmp/fp8.json

All runs have the config configs/emoji/emoji_256.py but for their length, batch and `kernels.fp8`. The band is the least
and the largest value of the bf16 seeds: of the training loss in each stretch of `--log-interval` steps, and of the
validation loss, whose noise and timesteps are the same in all runs. FP8 runs have the first seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli

CONFIG = "configs/emoji/emoji_256.py"
TINY = ["hidden_size=32", "depth=1", "num_heads=2", "mixed_precision=no", "validation.num_samples=4"]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a step (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[43, 44, 45], help="of the bf16 runs (default: 43 44 45)"
    )
    parser.add_argument("--recipes", nargs="+", default=["rowwise", "tensorwise"], help="FP8 runs (default: both)")
    parser.add_argument("--features", default="output/features/emoji-256", help="the store (default: %(default)s)")
    parser.add_argument("--log-interval", type=int, default=50, help="steps of a stretch (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small network, 6 steps of 4: to try the program itself")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("output/fp8-loss-band"), help="runs (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fp8_loss_band.json"), help="JSON")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.batch_size, args.log_interval = 6, 4, 2
    write_report(args.out, measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    shutil.rmtree(args.work_dir, ignore_errors=True)
    band = [train(args, f"bf16-{seed}", [f"seed={seed}"]) for seed in args.seeds]
    runs = [{"run": "bf16", "seed": seed, **run} for seed, run in zip(args.seeds, band)]
    for recipe in args.recipes:
        run = train(args, recipe, [f"seed={args.seeds[0]}", f"kernels.fp8={recipe}"])
        runs.append({"run": f"fp8 {recipe}", "seed": args.seeds[0], **run, **compared(run, band)})
    return {
        "benchmark": f"{CONFIG}, {args.steps} steps of {args.batch_size}, FP8 against {len(band)} bf16 seeds",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu (FP8 is emulated)",
        "runs": runs,
    }


def train(args: argparse.Namespace, name: str, options: list[str]) -> dict[str, Any]:
    """One run; its loss at every log line and its last validation loss."""
    from diffusion.config import load_config
    from diffusion.ranks import Ranks
    from diffusion.training import Reporting, Trainer, denoising_objective

    config = load_config(
        CONFIG,
        [
            f"max_steps={args.steps}",
            f"train_batch_size={args.batch_size}",
            f"data.root={args.features}",
            f"log_interval={args.log_interval}",
            f"validation.every_steps={args.steps}",
            "validation.prompts=[]",
            "save_model_steps=None",
            f"lr_schedule_args.num_warmup_steps={min(200, args.steps)}",
            *(TINY if args.tiny else []),
            *options,
        ],
    )
    folder = args.work_dir / name
    Trainer(config, denoising_objective, folder, reporting=Reporting(tensorboard=False), ranks=Ranks("auto")).fit()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": {row["step"]: round(row["loss"], 5) for row in rows if "loss" in row},
        "validation_loss": next(row["validation_loss"] for row in reversed(rows) if "validation_loss" in row),
        "images_per_s": round(max(row["images_per_s"] for row in rows if "images_per_s" in row), 1),
    }


def compared(run: dict[str, Any], band: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of the stretches inside the band, and whether the validation loss is in it (or below)."""
    curves = [each["loss"] for each in band]
    inside = [
        min(c[step] for c in curves) <= loss <= max(c[step] for c in curves) for step, loss in run["loss"].items()
    ]
    largest = max(each["validation_loss"] for each in band)
    return {
        "share of stretches in the band": round(sum(inside) / len(inside), 3),
        "validation loss in the band": run["validation_loss"] <= largest,
    }


if __name__ == "__main__":
    run_cli(main)
