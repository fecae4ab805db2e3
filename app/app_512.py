"""Draw pictures in a browser with the official 512 px model where it is on this machine, else with the bundled one.

DEMO_PORT=12345 python app/app_512.py
"""

from __future__ import annotations

from diffusion.config.app_cli import app_parser
from diffusion.errors import run_cli


def main() -> None:
    args = app_parser(__doc__).parse_args()

    from diffusion.web.program import show

    show(args, "512")


if __name__ == "__main__":
    run_cli(main)
