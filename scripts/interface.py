"""Draw pictures in a browser with any model; the page of app/app.py, on port 7788.

    python scripts/interface.py --model_path output/pretrained_models/PixArt-XL-2-1024-MS.pth \\
        --t5_path output/pretrained_models/t5_ckpts --tokenizer_path output/pretrained_models/sd-vae-ft-ema
"""

from __future__ import annotations

from diffusion.config.app_cli import interface_parser
from diffusion.errors import run_cli


def main() -> None:
    args = interface_parser(__doc__).parse_args()

    from diffusion.web.program import show_interface

    show_interface(args)


if __name__ == "__main__":
    run_cli(main)
