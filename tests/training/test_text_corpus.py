"""Texts for training: kept prompts stay out, added captions are true, and everything repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion.errors import DataError
from diffusion.evaluation.free_prompts import normalised, read_free_prompts
from diffusion.training.text_corpus import LABEL_TEMPLATES, add_captions, build_corpus, caption_variants

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
    options = {"size": 40_000, "seed": 0}
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


def test_added_captions_are_new_and_name_concept_or_keywords_and_tone() -> None:
    for row in ROWS[::97]:
        variants = caption_variants(row, 12, seed=0, excluded=KEPT)
        assert len(variants) >= 6
        assert {normalised(v) for v in variants}.isdisjoint(normalised(c) for c in [*row["captions"], *KEPT])
        assert len({normalised(v) for v in variants}) == len(variants)
        vocabulary = set(normalised(" ".join(row["captions"])).split())
        for variant in variants:
            assert not row["skin_tone"] or row["skin_tone"] in variant
            assert vocabulary & set(normalised(variant).split())
        assert variants == caption_variants(row, 12, seed=0, excluded=KEPT)
        assert variants != caption_variants(row, 12, seed=1, excluded=KEPT)


def test_an_excluded_text_is_never_added() -> None:
    row = ROWS[1000]
    first = caption_variants(row, 30, seed=0)
    fewer = caption_variants(row, 30, seed=0, excluded=[f"A {first[3]}."])
    assert normalised(first[3]) not in map(normalised, fewer)


def test_only_training_rows_get_more_captions(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    chosen = [next(row for row in ROWS if row["split"] == split) for split in ("train", "heldout", "reserved")]
    for row in chosen:
        (source / row["file_name"]).write_bytes((EMOJI / row["file_name"]).read_bytes())
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    (source / "free_prompts.jsonl").write_bytes((EMOJI / "free_prompts.jsonl").read_bytes())
    pictures, captions = add_captions(source, tmp_path / "more", 5, seed=0)
    found = [json.loads(line) for line in (tmp_path / "more/metadata.jsonl").read_text().splitlines()]
    assert (pictures, captions) == (3, sum(len(row["captions"]) for row in found))
    assert len(found[0]["captions"]) == len(chosen[0]["captions"]) + 5
    assert found[1:] == chosen[1:]
    assert (tmp_path / "more" / chosen[0]["file_name"]).read_bytes() == (source / chosen[0]["file_name"]).read_bytes()
    with pytest.raises(DataError, match="already"):
        add_captions(source, tmp_path / "more", 5, seed=0)
