"""Encode the pictures of a feature store with a frozen picture encoder, for REPA (repa=dict(features=OUT)).

    python tools/extract_alignment.py output/features/emoji-256 --encoder ENCODER --out output/features/emoji-alignment

ENCODER is a local folder of transformers (DINOv2, ViT, ...) or timm. The pictures are decoded from the store's latents,
so crop and size are those of training; a picture is scaled so that a patch of the encoder is a token of the network.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.config.extraction_cli import DEFAULT_PRETRAINED
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("store", help="folder of the feature store")
    add("--encoder", type=Path, required=True, help="local folder of the picture encoder")
    add("--out", type=Path, required=True, help="folder of the alignment features")
    add(
        "--pretrained", type=Path, default=DEFAULT_PRETRAINED,
        help="pipeline or VAE folder that made the store (default: %(default)s)",
    )  # fmt: skip
    add("--batch-size", type=int, default=32, help="pictures at a time (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    args = parser.parse_args()

    from diffusion.devices import choose_device
    from diffusion.features import FeatureStore
    from diffusion.features.alignment import extract_alignment

    made = extract_alignment(
        FeatureStore(args.store),
        args.encoder,
        args.pretrained,
        args.out,
        device=choose_device(args.device),
        batch_size=args.batch_size,
    )
    print(f"{args.out}: {len(made)} pictures, {made.channels} channels a token")


if __name__ == "__main__":
    run_cli(main)
