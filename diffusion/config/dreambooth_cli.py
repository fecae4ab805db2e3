"""Command line of train_scripts/train_dreambooth.py: the training flags, and those of a subject."""

from __future__ import annotations

import argparse

from diffusion.config.cli import train_parser

_EXAMPLE = (
    "python train_scripts/train_dreambooth.py configs/emoji/dreambooth.py --work-dir output/dreambooth \\\n"
    '      --train_class FOLDER --prompt "sks dog face" --class_prompt "dog face"'
)


def dreambooth_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser; every flag of the subject is a config key, which it overrides."""
    parser = train_parser(description, _EXAMPLE)
    add = parser.add_argument
    add("--train_class", help="folder of the subject's pictures, instead of the config's data.root")
    add("--prompt", help="the prompt that names the subject, with a rare word in it, instead of the config's")
    add("--token", help="that word, for a check of the prompt")
    add("--class_prompt", help="prior preservation: what the subject is one of")
    add("--num_class_images", type=int, help="pictures of the class that the model draws first")
    add("--prior_weight", type=float, help="pictures of the class learned for each picture of the subject")
    add("--rank", type=int, help="train an adapter of this rank instead of all weights")
    add("--lr", type=float, help="learning rate, instead of the config's")
    add("--save_step", type=int, help="optimiser steps between checkpoints, instead of the config's")
    return parser
