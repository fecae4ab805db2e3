"""Draw pictures in a browser in 4 steps, with a model distilled by LCM or with an LCM-LoRA.

    DEMO_PORT=12345 python app/app_lcm.py
    DEMO_PORT=12345 python app/app_lcm.py --is_lora --lora_repo_id output/loras/lcm

Without such a model on this machine it draws with the bundled one and its LCM-LoRA.
"""

from __future__ import annotations

from diffusion.config.app_cli import lcm_app_parser
from diffusion.errors import run_cli


def main() -> None:
    args = lcm_app_parser(__doc__).parse_args()

    from diffusion.web.program import show

    show(args, "LCM")


if __name__ == "__main__":
    run_cli(main)
