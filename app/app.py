"""Draw pictures in a browser.

    DEMO_PORT=12345 python app/app.py
    DEMO_HOST=0.0.0.0 DEMO_AUTH=me:secret python app/app.py
    python app/app.py --model_path output/run/checkpoints/checkpoint-2000

Draws with the official 1024 px model where it is in output/pretrained_models, else with the small bundled one.
"""

from __future__ import annotations

from diffusion.config.app_cli import app_parser
from diffusion.errors import run_cli


def main() -> None:
    args = app_parser(__doc__).parse_args()

    from diffusion.web.program import show

    show(args)


if __name__ == "__main__":
    run_cli(main)
