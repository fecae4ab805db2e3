"""A ControlNet of the bundled model: does it follow edges, and still draw what the label says?

    python benchmarks/finetune_controlnet.py

The pictures of data/emoji are made smaller and moved about on their white ground, which no label tells, and extracted
with their Canny edges; a ControlNet is trained on the training split. Drawn are labels of both splits with the edges of
their moved pictures (F1 of edge pixels within 1 px, against the base without condition; R@1 after moving back) and
with those of the pictures as they are. Minutes on one GPU; to try it on a CPU:
--pictures 24 --steps 2 --batch-size 2 --limit 2 --bs 4.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from finetuning import add_arguments, ensure_store, figures, labels_of, open_pipeline, rows_of, train
from PIL import Image
from report import write_report
from torch import Tensor

from diffusion.checkpoints import load_controlnet
from diffusion.errors import run_cli
from diffusion.evaluation.edges import edge_f1
from diffusion.evaluation.retrieval import load_gallery, to_pixels
from diffusion.features.sources import Sample
from diffusion.images import canny_edges, labelled_grid, to_pil
from diffusion.inference.program import show_notices
from diffusion.process import keyed_integer
from diffusion.training.control import ControlNet, side_by_side

SIDE = 256
SMALLEST = 8  # tenths of the side that a moved picture takes at least: the base never drew small things
SHOWN = 12


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "finetune_controlnet")
    add = parser.add_argument
    add("--steps", type=int, default=4000, help="optimiser steps (default: %(default)s)")
    add("--sampling-steps", type=int, default=20, help="solver steps (default: %(default)s)")
    add("--moved", type=Path, default=Path("build/emoji-moved"), help="folder of the moved pictures")
    add("--features", type=Path, default=Path("output/features/emoji-moved"), help="feature store of them")
    return parser


def box_of(number: int) -> tuple[int, int, int, int]:
    """Where picture `number` stands: (left, top, right, bottom)."""
    side = SIDE * SMALLEST // 10 + keyed_integer(0, "side", number, SIDE * (10 - SMALLEST) // 10 + 1)
    left, top = (keyed_integer(0, name, number, SIDE - side + 1) for name in ("left", "top"))
    return left, top, left + side, top + side


def moved(image: Image.Image, number: int) -> Image.Image:
    left, top, right, bottom = box_of(number)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return canvas


def moved_back(image: Image.Image, number: int) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box_of(number))


def write_moved(samples: list[Sample], folder: Path) -> Path:
    """An ImageFolder of the moved pictures with their captions and attributes; what is there is kept."""
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def write(number: int) -> dict[str, Any]:
        sample = samples[number]
        path = folder / "images" / f"{number:04d}.png"
        if not path.is_file():
            moved(sample.decode(), number).save(path, compress_level=1)
        return {"file_name": f"images/{path.name}", "captions": list(sample.captions), **sample.attributes}

    with ThreadPoolExecutor() as pool:
        lines = [json.dumps(row) + "\n" for row in pool.map(write, range(len(samples)))]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def edges_of(pictures: list[Image.Image]) -> Tensor:
    """(N, 3, H, W) in [-1, 1], white lines on black."""
    return canny_edges(to_pixels(pictures) * 2 - 1)


def drawings(
    pipeline: Any, labels: list[str], args: argparse.Namespace, edges: Tensor | None, strength: float = 1.0
) -> Any:
    """Pictures of labels; picture i has seed i, whatever it follows."""
    pictures = []
    for start in range(0, len(labels), args.bs):
        batch = labels[start : start + args.bs]
        given = {} if edges is None else {"control_image": edges[start : start + args.bs]}
        given |= {} if edges is None else {"controlnet_conditioning_scale": strength}
        seeds = [start + index for index in range(len(batch))]
        pictures += pipeline(batch, num_inference_steps=args.sampling_steps, seed=seeds, **given).images
    return pictures


def main() -> None:
    args = build_parser().parse_args()
    show_notices()
    gallery = load_gallery(args.data)
    store = ensure_store(write_moved(gallery.samples, args.moved), args.features, args.pictures, "canny")
    begun = time.perf_counter()
    work_dir = args.work_dir / "run"
    train("configs/emoji/emoji_controlnet.py", ControlNet(), work_dir, store, args.steps, args)
    seconds = round(time.perf_counter() - begun, 1)

    rows = rows_of(gallery, args.limit)
    labels = labels_of(gallery, rows)
    real = [gallery.samples[row].decode() for row in rows]
    edges = {"own edges": edges_of(real), "moved edges": edges_of([moved(p, row) for p, row in zip(real, rows)])}
    pipeline = open_pipeline()
    draw = partial(drawings, pipeline, labels, args)
    base = draw(None)
    pipeline.controlnet = load_controlnet(
        work_dir / "checkpoints" / f"checkpoint-{args.steps}", pipeline.transformer, ema=True
    )
    silent = draw(edges["own edges"], 0.0)
    ceiling = [moved_back(moved(picture, row), row) for picture, row in zip(real, rows)]
    result: dict[str, Any] = {
        "base": figures(gallery, rows, base),
        "real, moved and back": figures(gallery, rows, ceiling),
    }
    pictures = {"base": base}
    for name, condition in edges.items():
        pictures[name] = draw(condition)
        back = pictures[name] if name == "own edges" else [moved_back(p, row) for p, row in zip(pictures[name], rows)]
        result[name] = {
            **figures(gallery, rows, back),
            "f1": f1(condition, pictures[name]),
            "f1_of_base": f1(condition, base),
        }
    lost = {name: round(result["base"]["r1"] - result[name]["r1"], 1) for name in edges}
    bars = {
        "moved edges: F1 at least twice that of the base": result["moved edges"]["f1"]
        >= 2 * result["moved edges"]["f1_of_base"],
        "own edges: R@1 loses at most 5 points": lost["own edges"] <= 5,
        "moved edges: R@1 loses at most 5 points": lost["moved edges"] <= 5,
        "strength 0 is the base bit for bit": all(a.tobytes() == b.tobytes() for a, b in zip(base, silent)),
    }
    write_report(args.output, {
        "benchmark": "F1 of edges within 1 px, R@1 in percent of labels, same seeds", "drawings": len(rows),
        "moved_pictures_take": f"{10 * SMALLEST} to 100 % of the side",
        "steps": args.steps, "batch_size": args.batch_size, "training_seconds": seconds, **result, "lost_r1": lost,
        "bars": bars,
    })  # fmt: skip
    chosen = range(0, len(rows), max(1, len(rows) // SHOWN))[:SHOWN]
    triples = [
        side_by_side(side_by_side(to_pil(edges["moved edges"][i]), pictures["moved edges"][i]), base[i]) for i in chosen
    ]
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(
        [t.resize((t.width // 2, t.height // 2)) for t in triples], [labels[i] for i in chosen], columns=3
    ).save(args.grid, quality=88)
    print(f"sheet (edges, ControlNet, base): {args.grid}")


def f1(condition: Tensor, pictures: list[Image.Image]) -> float:
    found = edges_of(pictures)
    return round(edge_f1(condition[:, :1] > 0, found[:, :1] > 0).mean().item(), 3)


if __name__ == "__main__":
    run_cli(main)
