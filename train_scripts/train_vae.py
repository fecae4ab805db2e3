"""Train the KL autoencoder (f8, 4 channels) of the bundled model.

Example: python train_scripts/train_vae.py --data data/emoji --output output/pretrained_models/emoji-256/vae \\
    --seconds 280 --device cuda --compile
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--data", type=Path, required=True, help="ImageFolder with metadata.jsonl")
    add("--output", type=Path, required=True, help="vae folder; metrics are written beside it")
    length = parser.add_argument_group("length").add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument("--seconds", type=float, help="wall time of the training loop in seconds")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=64, help="pictures a step")
    add("--crop", type=int, default=256, help="side of the training crops in pixels")
    add("--lr", type=float, default=3e-3, help="peak learning rate of Muon")
    add("--kl-weight", type=float, default=1e-5, help="factor of the KL term")
    add("--colour-weight", type=float, default=4.0, help="factor of the squared error of colours")
    add("--detail-weight", type=float, default=0.0, help="factor of the fine-detail term")
    add("--latent-noise", type=float, default=0.0, help="the decoder sees latents disturbed by up to this many std")
    add = parser.add_argument_group("start").add_argument
    add("--start", type=Path, help="go on from this vae folder")
    add("--decoder-only", action="store_true", help="with --start: keep its encoder and latents")
    add = parser.add_argument_group("running").add_argument
    add("--limit", type=int, help="use only the first pictures of each split")
    add("--compile", action="store_true", help="torch.compile the network (warm-up counts as time)")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0, help="of weights, order and crops")
    args = parser.parse_args()

    from diffusion.training.autoencoder import AutoencoderConfig, train_autoencoder

    config = AutoencoderConfig(
        batch_size=args.batch_size,
        crop=args.crop,
        learning_rate=args.lr,
        kl_weight=args.kl_weight,
        colour_weight=args.colour_weight,
        detail_weight=args.detail_weight,
        latent_noise=args.latent_noise,
        steps=args.steps,
        seconds=args.seconds,
    )
    metrics = train_autoencoder(
        args.data,
        args.output,
        config,
        device=args.device,
        seed=args.seed,
        compile_model=args.compile,
        limit=args.limit,
        start=args.start,
        decoder_only=args.decoder_only,
    )
    print({key: value for key, value in metrics.items() if key != "history"})
    print(f"vae: {args.output}")


if __name__ == "__main__":
    run_cli(main)
