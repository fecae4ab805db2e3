"""Train the tokenizer of the bundled model.

python tools/train_tokenizer.py --texts build/text/teacher.safetensors --output DIR

Texts come from `tools/build_text_corpus.py` (or a plain text file, one text a line).
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--texts", type=Path, required=True, help="teacher file of build_text_corpus.py, or a .txt file"
    )
    parser.add_argument("--output", type=Path, required=True, help="tokenizer folder to write")
    parser.add_argument("--vocab-size", type=int, default=6000, help="pieces, special tokens included")
    args = parser.parse_args()

    from diffusion.text.tokenizer import train_tokenizer
    from diffusion.training.text_teacher import read_texts

    pieces = train_tokenizer(read_texts(args.texts), args.output, vocab_size=args.vocab_size)
    print(f"tokenizer with {pieces} pieces: {args.output}")


if __name__ == "__main__":
    run_cli(main)
