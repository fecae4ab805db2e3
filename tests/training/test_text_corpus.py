"""Texts for training: kept prompts stay out, and everything repeats."""

from __future__ import annotations

import json
from pathlib import Path

from diffusion.evaluation.free_prompts import normalised, read_free_prompts
from diffusion.training.text_corpus import LABEL_TEMPLATES, build_corpus

EMOJI = Path(__file__).resolve().parents[2] / "data/emoji"
ROWS = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
KEPT = [prompt.prompt for prompt in read_free_prompts(EMOJI / "free_prompts.jsonl")]


def entries() -> list[dict[str, object]]:
    """The bundled concepts in the form of emojibase."""
    plain = {row["concept"]: row for row in ROWS if not row["skin_tone"]}
    found = []
    for label, row in plain.items():
        group = 3 if row["group"] == "animals & nature" else 4 if row["group"] == "food & drink" else 5
        found.append(
            {"label": label, "tags": row["captions"][1][len(label) :].lstrip(":, ").split(", "), "group": group}
        )
    return found


def test_no_kept_prompt_is_a_training_text_or_a_filled_template() -> None:
    words = sorted({word for row in ROWS for word in row["text"].lower().split() if word.isalpha()})
    options = {"size": 80_000, "seed": 0}
    corpus = build_corpus([], entries(), words, **options, excluded=KEPT)  # type: ignore[arg-type]
    forbidden = {normalised(text) for text in KEPT}
    assert forbidden.isdisjoint(map(normalised, corpus.texts))
    nouns = {str(entry["label"]) for entry in entries()} | {tag for e in entries() for tag in e["tags"]}  # type: ignore[attr-defined]
    filled = {normalised(template.format(noun)) for template in LABEL_TEMPLATES for noun in nouns}
    assert forbidden.isdisjoint(filled)
    free = build_corpus([], entries(), words, **options)  # type: ignore[arg-type]
    stolen = next(text for text in free.texts[-2000:] if len(text.split()) == 3)
    again = build_corpus([], entries(), words, **options, excluded=[f"The {stolen.upper()}!"])  # type: ignore[arg-type]
    assert stolen in free.texts
    assert stolen not in again.texts
