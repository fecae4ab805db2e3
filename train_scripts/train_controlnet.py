"""Train a ControlNet around a frozen model: it learns to follow edges or other condition pictures.

The base is what --load-from or the config's load_from names, in resumed runs too. A checkpoint holds the branch in
controlnet/; draw with it by scripts/inference.py --model_path BASE --controlnet CHECKPOINT --control_image PICTURE.
"""

from __future__ import annotations

import argparse

from diffusion.config import train_parser
from diffusion.errors import run_cli

EXAMPLE = "python train_scripts/train_controlnet.py configs/emoji/emoji_controlnet.py --work-dir output/controlnet"
_FLAGS = {
    "lr": "optimizer.lr",
    "resume_optimizer": "resume_from.resume_optimizer",
    "resume_lr_scheduler": "resume_from.resume_lr_scheduler",
}


def main() -> None:
    parser = train_parser(__doc__, EXAMPLE)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--lr", type=float, help="learning rate, instead of the config's optimizer.lr")
    add("--resume_optimizer", action=switch, help="restore the optimiser's moments; absent: the config's")
    add("--resume_lr_scheduler", action=switch, help="restore the schedule's position; absent: the config's")
    args = parser.parse_args()

    from diffusion.training.control import ControlNet
    from diffusion.training.program import train

    train(args, ControlNet(), _FLAGS)


if __name__ == "__main__":
    run_cli(main)
