"""Draw pictures in a browser that follow the edges of another picture.

DEMO_PORT=12345 python app/app_controlnet.py
python app/app_controlnet.py --model_path DIR --controlnet FILE --hed FILE
"""

from __future__ import annotations

from diffusion.config.app_cli import controlnet_app_parser
from diffusion.errors import run_cli


def main() -> None:
    args = controlnet_app_parser(__doc__).parse_args()

    from diffusion.web.program import show_controlnet

    show_controlnet(args)


if __name__ == "__main__":
    run_cli(main)
