"""Encode a folder of captioned pictures into a feature store that training reads.

    python tools/extract_features.py data/emoji --out output/features/emoji-256

SOURCE is a Hugging Face ImageFolder (metadata.jsonl) or a folder of x.jpg beside x.txt. Call it again after an
interruption: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusion.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of pictures with captions")
    parser.add_argument("--out", type=Path, required=True, help="folder of the feature store")
    parser.add_argument(
        "--pretrained",
        type=Path,
        default=Path("output/pretrained_models/emoji-256"),
        help="diffusers pipeline folder with tokenizer, text_encoder and vae (default: %(default)s)",
    )
    parser.add_argument("--image-size", type=int, default=256, help="px (default: %(default)s)")
    parser.add_argument("--multi-scale", action="store_true", help="aspect-ratio buckets instead of a square")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of storage (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, default=120, help="tokens a caption at most (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures a VAE call (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="evenly spaced subset of at most this many pictures")
    parser.add_argument("--split", nargs="+", help="only these splits of metadata.jsonl")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    args = parser.parse_args()

    from diffusion.features import ExtractionSettings, extract_folder

    settings = ExtractionSettings(args.image_size, args.multi_scale, args.dtype, args.max_length, args.batch_size)
    counts = extract_folder(
        args.source, args.out, args.pretrained, settings, device=args.device, limit=args.limit, splits=args.split
    )
    print(
        f"{args.out}: {counts['pictures']} pictures, {counts['skipped']} skipped, "
        f"{counts['captions_cut']} captions cut at {args.max_length} tokens"
    )


if __name__ == "__main__":
    run_cli(main)
