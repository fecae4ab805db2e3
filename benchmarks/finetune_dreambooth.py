"""Does DreamBooth teach a subject? Three subjects that no training saw, with and without prior preservation.

    python benchmarks/finetune_dreambooth.py            # minutes on one GPU, about 40 on two CPU cores
    python benchmarks/finetune_dreambooth.py --tiny     # a few steps, to see that it runs

A subject is the picture of one of the concepts that data/emoji reserves: no training, of no part of the model, saw it
or its words. It is taught as "sks CLASS", by five versions that differ in place and size. Judged by the nearest of all
real pictures and those of the subjects:

- subject: of 10 seeds drawn for the prompt with the token, how many are nearest to the subject; at least 8 are wanted.
- drift: R@1 of other concepts of the class's group before, less R@1 after; at most 5 points are wanted with prior
  preservation; without, it is reported.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

BASE, CONFIG = "output/pretrained_models/emoji-256", "configs/emoji/dreambooth.py"
SUBJECTS = {
    "poodle": "dog",
    "teddy bear": "bear",
    "cupcake": "doughnut",
}  # reserved: a known class
TOKEN = "sks"
PLACES = ((0, 0, 1.0), (10, -6, 0.92), (-8, 8, 0.96), (6, 10, 0.88), (-10, -8, 0.94))  # right, down (px), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="(default: %(default)s)")
    add("--learning_rate", type=float, default=1e-4, help="(default: %(default)s)")
    add("--class_images", type=int, default=24, help="drawn for prior preservation (default: %(default)s)")
    add("--seeds", type=int, default=10, help="pictures of each subject (default: %(default)s)")
    add("--drift_concepts", type=int, default=48, help="concepts of the group (default: %(default)s)")
    add("--inference_steps", type=int, default=20, help="of the solver (default: %(default)s)")
    add("--data", default="data/emoji", help="captioned pictures, all of which are compared (default: %(default)s)")
    add("--tiny", action="store_true", help="1 subject, 1 step, 2 pictures")
    add("--output", type=Path, default=Path("benchmarks/results/finetune_dreambooth.json"))
    add("--grid", type=Path, default=Path("docs/images/finetune_dreambooth.webp"))
    args = parser.parse_args()
    args.subjects = list(SUBJECTS)
    if args.tiny:
        args.subjects, args.steps, args.seeds, args.inference_steps = list(SUBJECTS)[:1], 1, 2, 2
        args.class_images, args.drift_concepts, args.batch_size = 2, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        write_report(args.output, measure(args, Path(folder)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train each subject both ways and judge the drawings; returns the figures."""
    from diffusion.devices import choose_device
    from diffusion.evaluation.retrieval import load_gallery

    real = load_gallery(args.data)
    subjects = {name: subject_pictures(real, name) for name in args.subjects}
    gallery = with_subjects(real, subjects)
    device = choose_device("auto")
    rows, sheets = [], []
    for name, pictures in subjects.items():
        place = folder / name.replace(" ", "-")
        (place / "pictures").mkdir(parents=True)
        for number, picture in enumerate(pictures):
            picture.save(place / "pictures" / f"{number}.png")
        others = group_rows(real, SUBJECTS[name], args.drift_concepts)
        before = judge(args, gallery, name, others, None, device)
        for prior in (True, False):
            run = place / ("with-prior" if prior else "without-prior")
            started = time.perf_counter()
            train(args, name, place / "pictures", run, prior)
            seconds = time.perf_counter() - started
            after = judge(args, gallery, name, others, run, device)
            rows.append(
                {
                    "subject": name,
                    "class": SUBJECTS[name],
                    "prior_preservation": prior,
                    "training_s": round(seconds, 1),
                    "subject_drawn": after["hits"],
                    "seeds": args.seeds,
                    "subject_drawn_before": before["hits"],
                    "class_r1_before": before["r1"],
                    "class_r1_after": after["r1"],
                    "drift": round(before["r1"] - after["r1"], 4),
                }
            )
            label = f"{prompt_of(name)} ({name}), {'with' if prior else 'without'} prior: subject, before, after, class"
            sheets.append((label, [pictures[0], before["subject"], after["subject"], after["class"]]))
    save_grid(args.grid, sheets)
    kept = [row for row in rows if row["prior_preservation"]]
    return {
        "benchmark": f"DreamBooth, all weights, {args.steps} steps of {args.batch_size}",
        "class_images": args.class_images,
        "rows": rows,
        "bars": {
            "subject in at least 8 of 10 seeds, with prior": all(
                10 * r["subject_drawn"] >= 8 * r["seeds"] for r in kept
            ),
            "drift at most 5 points, with prior": all(row["drift"] <= 0.05 for row in kept),
        },
    }


def prompt_of(name: str) -> str:
    """The prompt that shall draw the subject; it does not say what it is."""
    return f"{TOKEN} {SUBJECTS[name]}"


def subject_pictures(gallery: Any, name: str) -> list[Any]:
    """Versions of the real picture of a concept."""
    from PIL import Image

    image = gallery.samples[gallery.concepts.index(name)].decode().convert("RGB")
    pictures = []
    for right, down, size in PLACES:
        side = round(image.width * size)
        sheet = Image.new("RGB", image.size, "white")
        margin = (image.width - side) // 2
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (margin + right, margin + down))
        pictures.append(sheet)
    return pictures


def with_subjects(real: Any, subjects: dict[str, list[Any]]) -> Any:
    """The gallery of real pictures with the versions of the subjects behind them, each of its subject's concept."""
    import torch

    from diffusion.evaluation.picture_features import colour_features, edge_features, fine_detail_energy
    from diffusion.evaluation.retrieval import to_pixels

    samples, parts = list(real.samples), []
    for name, pictures in subjects.items():
        pixels = to_pixels(pictures)
        features = colour_features(pixels) / real.scales[0], edge_features(pixels) / real.scales[1]
        parts.append((*features, fine_detail_energy(pixels)))
        samples += [samples[real.concepts.index(name)]] * len(pictures)
    blocks = [torch.cat(block) for block in zip((real.colour, real.edges, real.detail), *parts)]
    return replace(real, samples=samples, colour=blocks[0], edges=blocks[1], detail=blocks[2])


def group_rows(gallery: Any, name: str, count: int) -> list[int]:
    """The class itself and evenly spaced other concepts of its group, one training picture each."""
    from diffusion.evaluation.drawing import spread

    own = gallery.concepts.index(name)
    group = gallery.samples[own].attributes["group"]
    found: dict[str, int] = {}
    for row in gallery.split("train"):
        if gallery.samples[row].attributes["group"] == group and gallery.concepts[row] != name:
            found.setdefault(gallery.concepts[row], row)
    return [own, *spread(list(found.values()), count - 1)]


def train(args: argparse.Namespace, name: str, pictures: Path, out: Path, prior: bool) -> None:
    """The DreamBooth program, as a person would call it."""
    import torch

    from diffusion.config.dreambooth_cli import dreambooth_parser
    from diffusion.training.dreambooth import train_dreambooth

    flags = ["--train_class", pictures, "--prompt", prompt_of(name), "--token", TOKEN]
    flags += ["--lr", args.learning_rate, "--save_step", 100000, "--report_to", "none"]
    if prior:
        flags += ["--class_prompt", SUBJECTS[name], "--num_class_images", args.class_images]
    precision = "bf16" if torch.cuda.is_available() else "no"
    options = [f"max_steps={args.steps}", f"train_batch_size={args.batch_size}", f"mixed_precision={precision!r}"]
    options += ["validation.every_steps=100000", "validation.at_start=False", "validation.prompts=[]"]
    options.append(f"validation.num_inference_steps={args.inference_steps}")
    command = [CONFIG, "--work-dir", out, *flags, "--cfg-options", *options]
    train_dreambooth(dreambooth_parser("").parse_args([str(part) for part in command]))


def judge(
    args: argparse.Namespace, gallery: Any, name: str, others: list[int], run: Path | None, device: Any
) -> dict[str, Any]:
    """Draw the subject and its class's group by the base (run None) or the trained weights."""
    from diffusion.checkpoints.training_state import latest_checkpoint
    from diffusion.evaluation.drawing import DrawingSettings, draw
    from diffusion.evaluation.retrieval import nearest_pictures, recall, to_pixels
    from diffusion.inference import PixArtPipeline

    weights = BASE if run is None else latest_checkpoint(run / "checkpoints")
    pipe = PixArtPipeline.from_pretrained(BASE, transformer=weights, device=device)
    pipe.set_progress_bar_config(disable=True)
    settings = DrawingSettings(num_inference_steps=args.inference_steps, batch_size=24)

    def nearest(pictures: list[Any]) -> list[list[int]]:
        return nearest_pictures(gallery.distances(to_pixels(pictures))[0], gallery.groups, 1)

    subject = draw(pipe, [prompt_of(name)] * args.seeds, settings)
    hits = sum(gallery.concepts[found[0]] == name for found in nearest(subject))
    drawn = draw(pipe, [gallery.samples[row].captions[0] for row in others], settings)
    r1 = recall(nearest(drawn), gallery.concepts, [gallery.concepts[row] for row in others], 1)
    return {"hits": hits, "r1": round(r1, 4), "subject": subject[0], "class": drawn[0]}


def save_grid(path: Path, sheets: list[tuple[str, list[Any]]]) -> None:
    """One row of pictures a run."""
    from PIL import Image

    from diffusion.images import labelled_grid

    pictures = []
    for _, parts in sheets:
        sheet = Image.new("RGB", (len(parts) * 128, 128), "white")
        for place, image in enumerate(parts):
            sheet.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (128 * place, 0))
        pictures.append(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(pictures, [label for label, _ in sheets], columns=2).save(path, quality=88)


if __name__ == "__main__":
    run_cli(main)
