"""What the benchmarks of fine-tuning share: a store of the bundled data, a run, drawings and what they show."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusion.config import load_config
from diffusion.devices import choose_device
from diffusion.evaluation.drawing import DrawingSettings, draw, judge, spread
from diffusion.evaluation.retrieval import Gallery
from diffusion.features import ExtractionSettings, extract_folder
from diffusion.images import labelled_grid
from diffusion.inference import PixArtPipeline
from diffusion.training import Reporting, Trainer
from diffusion.training.family import Family

PARTS = "output/pretrained_models/emoji-256"


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("--batch-size", type=int, default=256, help="training samples a step (default: %(default)s)")
    add("--data", default="data/emoji", help="captioned pictures, all of which are compared (default: %(default)s)")
    add("--pictures", type=int, help="train on so many of them, evenly spaced (default: all)")
    add("--limit", type=int, default=110, help="captions drawn a split (default: %(default)s)")
    add("--bs", type=int, default=110, help="pictures drawn at a time (default: %(default)s)")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the training configs")
    add("--work-dir", type=Path, default=Path(f"output/{name}"))
    add("--output", type=Path, default=Path(f"benchmarks/results/{name}.json"))
    add("--grid", type=Path, default=Path(f"docs/images/{name}.webp"))


def ensure_store(source: str | Path, out: Path, pictures: int | None, condition: str | None = None) -> Path:
    """Extract a store, or what of it is missing."""
    device = choose_device("auto")
    settings = ExtractionSettings(image_size=256, dtype="bf16", batch_size=64, condition=condition)
    extract_folder(source, out, PARTS, settings, limit=pictures, device=str(device))
    return out


def train(
    config_file: str, family: Family, work_dir: Path, store: Path, steps: int, args: argparse.Namespace
) -> Trainer:
    """A run of so many steps, anew; validates at its end."""
    shutil.rmtree(work_dir, ignore_errors=True)
    options = [
        f"data.root={store}",
        f"max_steps={steps}",
        f"train_batch_size={args.batch_size}",
        f"save_model_steps={steps}",
    ]
    options += ["validation.prompts=[]", f"validation.every_steps={steps}", "log_interval=20"]
    if not torch.cuda.is_available():
        options += ["mixed_precision=no", "num_workers=0"]
    config = load_config(config_file, [*options, *args.cfg_options])
    trainer = Trainer(config, family.objective, work_dir, reporting=Reporting(tensorboard=False), family=family)
    trainer.fit()
    return trainer


def open_pipeline(transformer: Any = PARTS, algorithm: str = "dpm-solver") -> PixArtPipeline:
    """The bundled pipeline on the fastest device, in float32, with its transformer or another."""
    pipeline = PixArtPipeline.from_pretrained(
        PARTS, transformer=transformer, ema=True, algorithm=algorithm, device=choose_device("auto")
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rows_of(gallery: Gallery, limit: int) -> list[int]:
    """Rows that are drawn: of both splits."""
    return [row for split in ("heldout", "train") for row in spread(gallery.split(split), limit)]


def labels_of(gallery: Gallery, rows: Sequence[int]) -> list[str]:
    return [gallery.samples[row].captions[0] for row in rows]


def drawn(
    pipeline: PixArtPipeline, gallery: Gallery, rows: Sequence[int], settings: DrawingSettings
) -> tuple[list[Image.Image], dict[str, float]]:
    """Pictures of the rows' labels, and how often each is nearest to the picture that was meant."""
    pictures = draw(pipeline, labels_of(gallery, rows), settings)
    return pictures, figures(gallery, rows, pictures)


def figures(gallery: Gallery, rows: Sequence[int], pictures: list[Image.Image]) -> dict[str, float]:
    """Share of drawings nearest to the picture that was meant, in percent, and their sharpness."""
    found = judge(gallery, "", rows, labels_of(gallery, rows), pictures).figures
    return {
        "r1": round(100 * found["picture_r1"], 1),
        "r5": round(100 * found["picture_r5"], 1),
        "sharpness": found["sharpness"],
    }


def write_sheet(path: Path, pictures: dict[str, list[Any]], labels: list[str], shown: int, side: int = 128) -> None:
    """A row a kind, a column for each of so many labels, evenly spaced."""
    chosen = range(0, len(labels), max(1, len(labels) // shown))[:shown]
    cells = [(drawings[i], f"{kind}: {labels[i]}") for kind, drawings in pictures.items() for i in chosen]
    sheet = labelled_grid(
        [picture.resize((side, side)) for picture, _ in cells], [text for _, text in cells], columns=len(chosen)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)
    print(f"sheet: {path}")
