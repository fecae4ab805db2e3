"""Train PixArt on precomputed features.

python train_scripts/train.py configs/emoji/emoji_demo.py --work-dir output/demo
torchrun --nproc-per-node 8 train_scripts/train.py CONFIG --work-dir DIR --resume-from latest
torchrun --nproc-per-node 8 train_scripts/train.py CONFIG --work-dir DIR --doctor
python train_scripts/train.py --replay WORK/replay/step-0001234/replay.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from diffusion.config import config_overrides, load_config, train_parser
from diffusion.errors import run_cli


def registered_models() -> Sequence[str]:
    """Names a config may give as `model`; imports torch."""
    from diffusion.models import model_names

    return model_names()


class _Replay(argparse.Action):
    """--replay: run one recorded step and leave, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        from diffusion.training import replay_step

        replay_step(values)
        parser.exit()


def main() -> None:
    parser = train_parser(__doc__)
    parser.add_argument("--doctor", action="store_true", help="check devices, network, disk, features, config; no run")
    parser.add_argument("--replay", metavar="FILE", action=_Replay, help="run a skipped step again; needs no config")
    args = parser.parse_args()
    if args.doctor:
        from diffusion.training import check_up

        config = load_config(args.config, config_overrides(args), choices={"model": registered_models})
        sys.exit(check_up(config, args.work_dir or config.work_dir))

    from diffusion.training.program import train

    train(args)


if __name__ == "__main__":
    run_cli(main)
