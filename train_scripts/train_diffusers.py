"""Fine-tune the transformer of a diffusers pipeline, a folder or a model of the hub, with pictures during training.

The network's shape, T5, VAE and latent scale are the pipeline's; data, schedule and optimiser are the config's.
"""

from __future__ import annotations

from diffusion.config import train_parser
from diffusion.errors import run_cli

_EXAMPLE = (
    "python train_scripts/train_diffusers.py configs/emoji/own_pictures.py --work-dir output/tuned "
    "--pipeline_load_from output/pretrained_models/emoji-256"
)


def main() -> None:
    parser = train_parser(__doc__, _EXAMPLE)
    parser.add_argument("--pipeline_load_from", help="diffusers pipeline folder or hub name; absent: the config's")
    args = parser.parse_args()

    from diffusion.training.diffusers_program import train_diffusers

    print(f"run folder: {train_diffusers(args)}")


if __name__ == "__main__":
    run_cli(main)
