"""Train the text encoder of the bundled model by distillation from precomputed sentence embeddings.

Example: python train_scripts/train_text_encoder.py --tokenizer output/pretrained_models/emoji-256/tokenizer \\
    --teacher-embeddings build/text/teacher.safetensors --output output/pretrained_models/emoji-256/text_encoder \\
    --steps 3000 --device cuda
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tools/train_tokenizer.py")
    parser.add_argument("--teacher-embeddings", type=Path, required=True, help="file of tools/build_text_corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="text_encoder folder; metrics are written beside it")
    parser.add_argument("--captions", type=Path, help="folder of tools/add_captions.py: its captions name pictures")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=1024, help="texts a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile: slow to start, then faster on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    args = parser.parse_args()

    from diffusion.training.text_corpus import read_rows
    from diffusion.training.text_distillation import TextEncoderConfig, train_text_encoder
    from diffusion.training.text_names import named_texts
    from diffusion.training.text_teacher import load_teacher_texts

    data = load_teacher_texts(args.teacher_embeddings)
    named = None
    if args.captions is not None:
        named = named_texts(read_rows(args.captions / "metadata.jsonl", "concept"), data)
    metrics = train_text_encoder(
        args.tokenizer,
        data,
        args.output,
        named=named,
        steps=args.steps,
        device=args.device,
        seed=args.seed,
        config=TextEncoderConfig(batch_size=args.batch_size, learning_rate=args.lr),
        compile_model=args.compile,
    )
    print({key: value for key, value in metrics.items() if key != "history"})
    print(f"text encoder: {args.output}")


if __name__ == "__main__":
    run_cli(main)
