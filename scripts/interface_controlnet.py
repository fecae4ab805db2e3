"""Draw pictures in a browser that follow edges; the page of app/app_controlnet.py, on port 7788.

    python scripts/interface_controlnet.py configs/pixart_app_config/PixArt_xl2_img1024_controlHed.py \\
        --model_path output/pretrained_models/PixArt-XL-2-1024-ControlNet.pth
"""

from __future__ import annotations

from diffusion.config.app_cli import interface_controlnet_parser
from diffusion.errors import run_cli


def main() -> None:
    args = interface_controlnet_parser(__doc__).parse_args()

    from diffusion.web.program import show_controlnet

    show_controlnet(args, default_port=7788)


if __name__ == "__main__":
    run_cli(main)
