"""Does train_diffusers.py teach? All weights on pencil drawings of bundled pictures, judged on concepts it did not see.

    python benchmarks/finetune_diffusers.py             # meant for one GPU
    python benchmarks/finetune_diffusers.py --tiny      # a few steps, to see that it runs

The commands of docs/finetuning.md, as a person would type them: the drawings are extracted, the bundled pipeline is
tuned on them, and a checkpoint of the run is drawn with. Distances are those of benchmarks/pencil_style.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pencil_style import BASE, compare, load_style, save_grid, write_drawings
from report import write_report

from diffusion.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pictures", type=int, default=300, help="drawings that are learned (default: %(default)s)")
    add("--steps", type=int, default=300, help="optimiser steps (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="(default: %(default)s)")
    add("--concepts", type=int, default=100, help="concepts that are judged (default: %(default)s)")
    add("--inference_steps", type=int, default=20, help="of the solver (default: %(default)s)")
    add("--data", default="data/emoji", help="captioned pictures, all of which are compared (default: %(default)s)")
    add("--tiny", action="store_true", help="2 steps and 4 concepts")
    add("--output", type=Path, default=Path("benchmarks/results/finetune_diffusers.json"))
    add("--grid", type=Path, default=Path("docs/images/finetune_diffusers.webp"))
    args = parser.parse_args()
    if args.tiny:
        args.pictures, args.steps, args.batch_size, args.concepts, args.inference_steps = 4, 2, 2, 4, 2
    with tempfile.TemporaryDirectory() as folder:
        write_report(args.output, measure(args, Path(folder)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, draw, compare; returns the figures."""
    from diffusion.devices import choose_device
    from diffusion.evaluation.drawing import DrawingSettings, draw
    from diffusion.inference import PixArtPipeline

    style = load_style(args.data, args.pictures, args.concepts)
    pictures = write_drawings(style, folder / "style")
    started = time.perf_counter()
    weights = train(args, pictures, folder)
    seconds = time.perf_counter() - started
    settings = DrawingSettings(num_inference_steps=args.inference_steps, batch_size=25)
    drawn = []
    for transformer in (f"{BASE}/transformer", weights):
        pipe = PixArtPipeline.from_pretrained(BASE, transformer=transformer, device=choose_device("auto"))
        pipe.set_progress_bar_config(disable=True)
        drawn.append(draw(pipe, style.captions(), settings))
    before, after = drawn
    figures = {
        "benchmark": f"all weights on {len(style.taught)} pencil drawings, {args.steps} steps of {args.batch_size}",
        "training_s": round(seconds, 1),
        **compare(style, before, after, "tuned"),
    }
    save_grid(args.grid, style, before, after, "tuned")
    return figures


def train(args: argparse.Namespace, pictures: Path, folder: Path) -> Path:
    """Features and run; returns the transformer of its last checkpoint."""
    import torch

    store, run = folder / "store", folder / "run"
    options = {
        "data.root": store.resolve(),
        "max_steps": args.steps,
        "train_batch_size": args.batch_size,
        "save_model_steps": args.steps,
        "validation.every_steps": None,
        "validation.at_start": False,
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
    }
    script, config = "train_scripts/train_diffusers.py", "configs/emoji/own_pictures.py"
    for command in (
        ["tools/extract_features.py", pictures, "--out", store],
        [script, config, "--work-dir", run, "--pipeline_load_from", BASE, "--report_to", "none", "--cfg-options",
         *(f"{key}={value}" for key, value in options.items())],
    ):  # fmt: skip
        subprocess.run([sys.executable, *map(str, command)], check=True)
    return run / "checkpoints" / f"checkpoint-{args.steps}"


if __name__ == "__main__":
    run_cli(main)
