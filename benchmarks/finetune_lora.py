"""Does a LoRA teach a style? Rank 8 on 12 pencil drawings of bundled pictures, judged on 100 concepts it did not see.

    python benchmarks/finetune_lora.py                  # meant for one GPU
    python benchmarks/finetune_lora.py --tiny           # a few steps, to see that it runs

The drawings are made by benchmarks/pencil_drawing.py. Distances are those of the retrieval among real pictures, here
among the drawings of all real pictures; two of them are 2 apart on average, by the scale of the features.

- progress: how far the paired distance (picture of a concept, drawing of its real picture) falls on the way from the
  base model's to that 2; at least 0.6 is wanted.
- R@1: drawings by the LoRA among the drawings of real pictures, and pictures by the base model among real pictures; at
  most 10 points less are wanted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pencil_drawing import pencil_drawing
from report import write_report

from diffusion.errors import run_cli

BASE = "output/pretrained_models/emoji-256"
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
    from diffusion.evaluation.drawing import DrawingSettings, draw, spread
    from diffusion.evaluation.retrieval import load_gallery, nearest_pictures, recall, to_pixels
    from diffusion.inference import PixArtPipeline

    real, drawings = load_gallery(args.data), load_gallery(args.data, pencil_drawing)
    rows = one_row_a_concept(real, real.split("train"))
    taught = spread(rows, TRAINED)
    judged = spread([row for row in rows if row not in taught], args.concepts)
    write_pictures(real, taught, folder / "style")
    started = time.perf_counter()
    train(args, folder / "style", folder / "lora")
    seconds = time.perf_counter() - started

    device = choose_device("auto")
    pipe = PixArtPipeline.from_pretrained(BASE, device=device)
    pipe.set_progress_bar_config(disable=True)
    captions = [real.samples[row].captions[0] for row in judged]
    settings = DrawingSettings(num_inference_steps=args.inference_steps, batch_size=25)
    before = draw(pipe, captions, settings)
    pipe.load_lora_weights(folder / "lora", adapter_name="style")
    pipe.set_adapters(["style"], [args.scale])
    after = draw(pipe, captions, settings)

    def paired(pictures: list[Any]) -> tuple[float, float]:
        """With colour and edges, and with edges alone."""
        both, colour = (found[range(len(judged)), judged].mean() for found in drawings.distances(to_pixels(pictures)))
        return float(both), float(both - colour)

    def first(gallery: Any, pictures: list[Any]) -> float:
        near = nearest_pictures(gallery.distances(to_pixels(pictures))[0], gallery.groups, 1)
        return recall(near, gallery.concepts, [gallery.concepts[row] for row in judged], 1)

    (start, edges_start), (end, edges_end) = paired(before), paired(after)
    figures = {
        "benchmark": f"LoRA of rank 8 on {TRAINED} pencil drawings, {args.steps} steps of {args.batch_size}",
        "training_s": round(seconds, 1),
        "lora_scale": args.scale,
        "adapter_file_mb": round((folder / "lora" / PEFT_WEIGHTS).stat().st_size / 1e6, 3),
        "concepts": len(judged),
        "paired_distance_base": round(start, 4),
        "paired_distance_lora": round(end, 4),
        "paired_distance_base_edges": round(edges_start, 4),
        "paired_distance_lora_edges": round(edges_end, 4),
        "distance_among_drawings": 2.0,
        "progress": round((start - end) / (start - 2.0), 4),
        "r1_base_among_real": round(first(real, before), 4),
        "r1_lora_among_drawings": round(first(drawings, after), 4),
    }
    figures["bars"] = {
        "progress at least 0.6": figures["progress"] >= 0.6,
        "R@1 at most 10 points less": figures["r1_lora_among_drawings"] >= figures["r1_base_among_real"] - 0.1,
        "file at most 2 MB": figures["adapter_file_mb"] <= 2.0,
    }
    save_grid(args.grid, real, judged, captions, before, after)
    return figures


def one_row_a_concept(gallery: Any, rows: list[int]) -> list[int]:
    """The first of the rows of each concept."""
    found: dict[str, int] = {}
    for row in rows:
        found.setdefault(gallery.concepts[row], row)
    return list(found.values())


def write_pictures(gallery: Any, rows: list[int], folder: Path) -> None:
    """An ImageFolder of drawings, under the captions of the real pictures."""
    folder.mkdir()
    lines = []
    for row in rows:
        sample = gallery.samples[row]
        pencil_drawing(sample.decode()).save(folder / f"{row}.png")
        lines.append(json.dumps({"file_name": f"{row}.png", "captions": list(sample.captions)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def save_grid(
    path: Path, gallery: Any, rows: list[int], labels: list[str], before: list[Any], after: list[Any]
) -> None:
    """Base, LoRA and the drawing of the real picture, side by side, for up to 12 concepts."""
    from PIL import Image

    from diffusion.images import labelled_grid

    chosen = range(0, len(rows), max(len(rows) // 12, 1))
    sheets = []
    for index in list(chosen)[:12]:
        sheet = Image.new("RGB", (3 * 128, 128), "white")
        for place, image in enumerate(
            (before[index], after[index], pencil_drawing(gallery.samples[rows[index]].decode()))
        ):
            sheet.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (128 * place, 0))
        sheets.append(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{labels[index]}: base, LoRA, real picture redrawn" for index in list(chosen)[:12]]
    labelled_grid(sheets, texts, columns=2).save(path, quality=88)


if __name__ == "__main__":
    run_cli(main)
