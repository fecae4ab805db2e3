"""One picture on a card of 8 GB: T5 in int8 encodes and leaves, then the transformer draws, then the VAE decodes.

python scripts/infer_pixart_8_bits.py --model_path output/pretrained_models/PixArt-XL-2-1024-MS

`scripts/inference.py --memory 8gb` does the same for many prompts.
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.config.sampling_cli import BUNDLED
from diffusion.errors import run_cli


def build_parser() -> ArgumentParser:
    """Command-line arguments; importing this needs no torch."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_path", default=BUNDLED, help="pipeline folder, or a transformer in any form")
    add("--pipeline_load_from", default=BUNDLED, help="T5 and VAE of a model that has none")
    add("--prompt", default="cute cat", help="what is drawn")
    add("--output", default="cat.png", help="the picture, or a folder for it; an existing file is kept")
    add("--step", type=int, default=20, help="steps of DPM-Solver++")
    add("--seed", type=int, default=0, help="of the noise")
    add("--device", default="auto", help="cpu, cuda, mps; auto = cuda where there is one, else mps, else cpu")
    return parser


def main() -> None:
    args = build_parser().parse_args()

    from diffusion.inference.program import draw_in_8_bits

    draw_in_8_bits(args)


if __name__ == "__main__":
    run_cli(main)
