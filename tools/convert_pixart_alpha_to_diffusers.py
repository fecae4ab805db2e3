"""Convert a native PixArt checkpoint into a diffusers folder, with the flags of PixArt-alpha.

    python tools/convert_pixart_alpha_to_diffusers.py --image_size 1024 --multi_scale_train True \\
        --orig_ckpt_path path/to/pth --dump_path path/to/diffusers --only_transformer=True

The file itself tells its kind; flags are checked against it. The way back: tools/convert_diffusers_to_pixart.py.
"""

from __future__ import annotations

from diffusion.config.conversion_cli import conversion_parser
from diffusion.errors import run_cli


def main() -> None:
    args = conversion_parser(__doc__).parse_args()

    from diffusion.checkpoints.conversion import convert_by_flags

    convert_by_flags(args)


if __name__ == "__main__":
    run_cli(main)
