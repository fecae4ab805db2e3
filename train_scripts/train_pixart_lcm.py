"""Distil a model into a latent consistency model (LCM), which draws in 1 to 8 steps without guidance.

The teacher is what --load-from or the config's load_from names, in resumed runs too. A checkpoint holds the student in
transformer/ and its average, which is the one to draw with, in transformer_ema/.
"""

from __future__ import annotations

from diffusion.config import train_parser
from diffusion.errors import run_cli

EXAMPLE = "python train_scripts/train_pixart_lcm.py configs/emoji/emoji_lcm.py --work-dir output/lcm"


def main() -> None:
    args = train_parser(__doc__, EXAMPLE).parse_args()

    from diffusion.training.distillation import LCM
    from diffusion.training.program import train

    train(args, LCM())


if __name__ == "__main__":
    run_cli(main)
