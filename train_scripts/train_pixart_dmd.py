"""Distil a model into a generator that draws in one step, by distribution matching (DMD).

The teacher is what --load-from or the config's load_from names, in resumed runs too. A checkpoint holds the generator
in transformer/ and, averaged, in transformer_ema/.
"""

from __future__ import annotations

from diffusion.config import train_parser
from diffusion.errors import run_cli

EXAMPLE = "python train_scripts/train_pixart_dmd.py configs/emoji/emoji_dmd.py --work-dir output/dmd"


def main() -> None:
    args = train_parser(__doc__, EXAMPLE).parse_args()

    from diffusion.training.one_step import DMD
    from diffusion.training.program import train

    train(args, DMD())


if __name__ == "__main__":
    run_cli(main)
