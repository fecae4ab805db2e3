"""The page as a hosted Space; copied to the root of the Space beside `diffusion/` and `output/`."""

from __future__ import annotations

from diffusion.config.app_cli import app_parser
from diffusion.errors import run_cli
from diffusion.web.program import show

if __name__ == "__main__":
    run_cli(lambda: show(app_parser(__doc__).parse_args([])))
