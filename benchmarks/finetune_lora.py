"""Does a LoRA teach a style? Rank 8 on 12 pencil drawings of bundled pictures, judged on 100 concepts it did not see.

    python benchmarks/finetune_lora.py                  # meant for one GPU
    python benchmarks/finetune_lora.py --tiny           # a few steps, to see that it runs

The drawings are made by benchmarks/pencil_drawing.py, distances are those of benchmarks/pencil_style.py.

- progress: how far the paired distance (picture of a concept, drawing of its real picture) falls on the way from the
  base model's to that 2; at least 0.6 is wanted.
- R@1: drawings by the LoRA among the drawings of real pictures, and pictures by the base model among real pictures; at
  most 10 points less are wanted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from pencil_style import BASE, compare, load_style, save_grid, write_drawings
from report import write_report

from diffusion.errors import run_cli

TRAINED = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=400, help="optimiser steps of 12 pictures (default: %(default)s)")
    add("--batch_size", type=int, default=12, help="(default: %(default)s)")
    add("--learning_rate", type=float, default=2e-4, help="(default: %(default)s)")
    add("--scale", type=float, default=0.8, help="strength that the adapter is drawn with (default: %(default)s)")
    add("--concepts", type=int, default=100, help="concepts that are judged (default: %(default)s)")
    add("--inference_steps", type=int, default=20, help="of the solver (default: %(default)s)")
    add("--data", default="data/emoji", help="captioned pictures, all of which are compared (default: %(default)s)")
    add("--tiny", action="store_true", help="2 steps and 4 concepts")
    add("--output", type=Path, default=Path("benchmarks/results/finetune_lora.json"))
    add("--grid", type=Path, default=Path("docs/images/finetune_lora.webp"))
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.batch_size, args.concepts, args.inference_steps = 2, 2, 4, 2
    with tempfile.TemporaryDirectory() as folder:
        write_report(args.output, measure(args, Path(folder)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, draw, compare; returns the figures."""
    from diffusion.adapters import PEFT_WEIGHTS
    from diffusion.devices import choose_device
    from diffusion.evaluation.drawing import DrawingSettings, draw
    from diffusion.inference import PixArtPipeline

    style = load_style(args.data, TRAINED, args.concepts)
    pictures = write_drawings(style, folder / "style")
    started = time.perf_counter()
    train(args, pictures, folder / "lora")
    seconds = time.perf_counter() - started

    pipe = PixArtPipeline.from_pretrained(BASE, device=choose_device("auto"))
    pipe.set_progress_bar_config(disable=True)
    settings = DrawingSettings(num_inference_steps=args.inference_steps, batch_size=25)
    before = draw(pipe, style.captions(), settings)
    pipe.load_lora_weights(folder / "lora", adapter_name="style")
    pipe.set_adapters(["style"], [args.scale])
    after = draw(pipe, style.captions(), settings)
    figures = {
        "benchmark": f"LoRA of rank 8 on {TRAINED} pencil drawings, {args.steps} steps of {args.batch_size}",
        "training_s": round(seconds, 1),
        "lora_scale": args.scale,
        "adapter_file_mb": round((folder / "lora" / PEFT_WEIGHTS).stat().st_size / 1e6, 3),
        **compare(style, before, after, "lora"),
    }
    figures["bars"] = {
        "progress at least 0.6": figures["progress"] >= 0.6,
        "R@1 at most 10 points less": figures["r1_lora_among_drawings"] >= figures["r1_base_among_real"] - 0.1,
        "file at most 2 MB": figures["adapter_file_mb"] <= 2.0,
    }
    save_grid(args.grid, style, before, after, "LoRA")
    return figures


def train(args: argparse.Namespace, pictures: Path, out: Path) -> None:
    """The LoRA program, as a person would call it."""
    import torch

    from diffusion.config.lora_cli import parse_lora_args
    from diffusion.training.lora_program import train_lora

    flags = {
        "pretrained_model_name_or_path": BASE,
        "train_data_dir": pictures,
        "output_dir": out,
        "rank": 8,
        "lora_alpha": 16,
        "learning_rate": args.learning_rate,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 20,
        "train_batch_size": args.batch_size,
        "num_train_epochs": 100000,
        "max_train_steps": args.steps,
        "checkpointing_steps": 100000,
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
        "base_dtype": "fp32",
        "save_dtype": "fp16",
        "report_to": "none",
        "seed": 0,
    }
    train_lora(parse_lora_args("", [f"--{name}={value}" for name, value in flags.items()]))


if __name__ == "__main__":
    run_cli(main)
