"""Train a small picture encoder on the bundled pictures: a stand-in for DINOv2 in REPA, where none is at hand.

    python train_scripts/train_alignment_encoder.py --data data/emoji --output output/alignment-encoder --device cuda
    python tools/extract_alignment.py output/features/emoji-256 --encoder output/alignment-encoder \\
        --out output/features/emoji-alignment

It knows what these pictures and their concepts say, and no more. A real encoder (a local folder of DINOv2, for example)
takes its place in the second command.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="ImageFolder with metadata.jsonl, whose rows have a concept")
    add("--output", type=Path, required=True, help="new folder of the encoder")
    add("--steps", type=int, default=2000, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="pictures a step (default: %(default)s)")
    add("--width", type=int, default=192, help="width of the network (default: %(default)s)")
    add("--depth", type=int, default=4, help="blocks of the network (default: %(default)s)")
    add("--image-size", type=int, default=256, help="px (default: %(default)s)")
    add("--limit", type=int, help="only so many pictures, spread over the data")
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()

    from diffusion.devices import choose_device
    from diffusion.training.alignment_encoder import train_alignment_encoder

    figures = train_alignment_encoder(
        args.data,
        args.output,
        steps=args.steps,
        batch_size=args.batch_size,
        width=args.width,
        depth=args.depth,
        image_size=args.image_size,
        device=choose_device(args.device),
        seed=args.seed,
        limit=args.limit,
    )
    print(figures)
    print(f"encoder: {args.output}")


if __name__ == "__main__":
    run_cli(main)
