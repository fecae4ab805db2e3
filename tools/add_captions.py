"""Give every training picture of the bundled data further captions in everyday words.

    python tools/add_captions.py data/emoji --output build/emoji-captions --captions 16

Writes a copy of the ImageFolder; rows of other splits keep their captions. None of the prompts in
SOURCE/free_prompts.jsonl, which are kept for evaluation, becomes a caption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusion.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=Path("data/emoji"), help="default data/emoji")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not hold a data set")
    parser.add_argument("--captions", type=int, default=16, help="further captions a picture (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from diffusion.training.text_corpus import add_captions

    pictures, captions = add_captions(args.source, args.output, args.captions, args.seed)
    print(f"{args.output}: {pictures} pictures, {captions} captions")


if __name__ == "__main__":
    run_cli(main)
