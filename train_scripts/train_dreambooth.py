"""DreamBooth: teach a model one subject from a few pictures; with --class_prompt it keeps what it knows of the class.

All weights train, or with --rank an adapter. Pictures are encoded into the run folder; pictures of the class are drawn
by the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusion.config.dreambooth_cli import dreambooth_parser
from diffusion.errors import run_cli


def registered_models() -> Sequence[str]:
    """Names a config may give as `model`; imports torch."""
    from diffusion.models import model_names

    return model_names()


def main() -> None:
    args = dreambooth_parser(__doc__).parse_args()

    from diffusion.training.dreambooth import train_dreambooth

    print(f"run folder: {train_dreambooth(args, {'model': registered_models})}")


if __name__ == "__main__":
    run_cli(main)
