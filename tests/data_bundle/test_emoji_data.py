"""The bundled data set is what its card says: fields, pictures, splits, near duplicates, toy layout, size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
EMOJI = REPOSITORY / "data" / "emoji"
TOY = REPOSITORY / "data" / "data_toy"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
DUPLICATE_BELOW = 2.5
HELDOUT_MARGIN = 5.0

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    lines = (EMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pixels(row: Row) -> np.ndarray:
    """The picture averaged to 64x64, independent of the builder's code: PIL's box filter, float32 per channel."""
    with Image.open(EMOJI / row["file_name"]) as image:
        channels = [channel.convert("F").resize((64, 64), Image.Resampling.BOX) for channel in image.split()]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def of_split(rows: list[Row], split: str) -> list[Row]:
    return [row for row in rows if row["split"] == split]


def test_rows_have_valid_fields(rows: list[Row]) -> None:
    assert len(rows) == 3373
    assert [row["hexcode"] for row in rows] == sorted({row["hexcode"] for row in rows})
    for row in rows:
        assert row["file_name"] == f"images/{row['hexcode']}.webp"
        assert row["text"] == row["captions"][0]
        assert 2 <= len(row["captions"]) == len(set(row["captions"]))
        assert row["captions"][1].startswith(row["text"])
        assert row["skin_tone"] in ("", *TONES)
        assert row["gender"] in ("", "female", "male")
        assert row["group"]
        assert row["subgroup"]
        assert not set("\u2018\u2019\u201c\u201d") & set("".join(row["captions"]))
        if row["skin_tone"]:
            assert all(f"{row['skin_tone']} skin tone" in caption for caption in row["captions"])
        else:
            assert row["text"] == row["concept"]


def test_every_picture_exists_once_and_is_256_rgb(rows: list[Row]) -> None:
    files = {path.relative_to(EMOJI).as_posix() for path in (EMOJI / "images").iterdir()}
    assert files == {row["file_name"] for row in rows}
    for name in files:
        with Image.open(EMOJI / name) as image:
            assert (image.size, image.mode, image.format) == ((256, 256), "RGB", "WEBP"), name


def test_alpha_was_composed_on_white(rows: list[Row]) -> None:
    """Nearly all drawings leave the top left corner free: a black or noisy ground would show there."""
    corners = []
    for row in rows[::40]:
        with Image.open(EMOJI / row["file_name"]) as image:
            corners.append(min(image.getpixel((0, 0))))
    assert np.mean(np.array(corners) >= 250) > 0.95


def test_sizes_of_splits(rows: list[Row]) -> None:
    assert Counter(row["split"] for row in rows) == {"train": 3136, "heldout": 220, "reserved": 17}
    assert Counter(row["skin_tone"] for row in of_split(rows, "heldout")) == dict.fromkeys(TONES, 44)


def test_parts_of_held_out_combinations_are_trained(rows: list[Row]) -> None:
    train = of_split(rows, "train")
    tones_of: dict[str, set[str]] = defaultdict(set)
    for row in train:
        tones_of[row["concept"]].add(row["skin_tone"])
    concepts_with = Counter(tone for tones in tones_of.values() for tone in tones)
    for row in of_split(rows, "heldout"):
        assert row["skin_tone"] in TONES
        assert row["skin_tone"] not in tones_of[row["concept"]], row["text"]
        assert len(tones_of[row["concept"]] - {""}) >= 2, row["text"]
        assert concepts_with[row["skin_tone"]] >= 200


def test_reserved_concepts_are_nowhere_else(rows: list[Row]) -> None:
    reserved = {row["concept"] for row in of_split(rows, "reserved")}
    assert len(reserved) == 12
    assert {row["split"] for row in rows if row["concept"] in reserved} == {"reserved"}
    trained = {caption for row in of_split(rows, "train") for caption in row["captions"]}
    assert not trained & {row["text"] for row in of_split(rows, "reserved")}


def test_duplicate_groups_do_not_cross_splits(rows: list[Row]) -> None:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["duplicate_group"]].append(row)
    for name, members in groups.items():
        assert name == members[0]["hexcode"]
        assert len({row["split"] for row in members}) == 1, name
    shared = [len(members) for members in groups.values() if len(members) > 1]
    assert (len(shared), sum(shared), max(shared)) == (166, 430, 8)


def test_duplicates_measured_again(rows: list[Row]) -> None:
    """Each of 24 pictures against all others: near means same group, and held-out pictures keep their margin."""
    small = np.stack([pixels(row) for row in rows]).reshape(len(rows), -1)
    grouped = [row for row in rows if row["duplicate_group"] != row["hexcode"]]
    sample = grouped[::40] + of_split(rows, "heldout")[::28] + of_split(rows, "reserved")[::5]
    index_of = {row["hexcode"]: index for index, row in enumerate(rows)}
    for row in sample:
        index = index_of[row["hexcode"]]
        distances = np.array([np.abs(other - small[index]).mean() for other in small])
        distances[index] = np.inf
        near = np.flatnonzero(distances < DUPLICATE_BELOW)
        assert all(rows[other]["duplicate_group"] == row["duplicate_group"] for other in near), row["text"]
        if row["split"] == "train":
            assert len(near) > 0, row["text"]
        else:
            assert distances.min() >= HELDOUT_MARGIN, row["text"]


def test_medium_is_darker_than_medium_light(rows: list[Row]) -> None:
    """The package exchanges the two tones in most concepts; the bundled pictures have them the right way round."""
    picture = {(row["concept"], row["skin_tone"]): row for row in rows}
    concepts = sorted({row["concept"] for row in rows if row["skin_tone"]})
    assert len(concepts) == 304
    for concept in concepts:
        brightness = [pixels(picture[concept, tone]).mean() for tone in ("medium-light", "medium", "medium-dark")]
        assert brightness == sorted(brightness, reverse=True), concept


def test_toy_layout_serves_both_readers() -> None:
    names = (TOY / "SA1B" / "partition" / "part0.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == len(set(names)) == 20
    for folder, suffix in (("images", ".jpg"), ("captions", ".txt")):
        assert {path.name for path in (TOY / "SA1B" / folder).iterdir()} == {name + suffix for name in names}
    infos = json.loads((TOY / "data_info.json").read_text(encoding="utf-8"))
    assert [Path(info["path"]).stem for info in infos] == names
    for info in infos:
        assert set(info) == {"height", "width", "ratio", "path", "prompt"}
        assert info["ratio"] == info["height"] / info["width"]
        with Image.open(TOY / info["path"]) as image:
            assert (image.size, image.mode) == ((info["width"], info["height"]), "RGB")
        caption = TOY / "SA1B" / "captions" / f"{Path(info['path']).stem}.txt"
        assert caption.read_text(encoding="utf-8").strip() == info["prompt"]


def test_sample_prompts_are_training_captions(rows: list[Row]) -> None:
    prompts = (REPOSITORY / "asset" / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 24
    known = {caption for row in of_split(rows, "train") for caption in row["captions"]}
    assert not set(prompts) - known


def test_size_and_licences(rows: list[Row]) -> None:
    assert sum(path.stat().st_size for path in EMOJI.rglob("*") if path.is_file()) < 18_000_000
    owners = {"fluent-emoji": "Microsoft", "lobehub-fluent-emoji-3d": "LobeHub", "emojibase": "Miles Johnson"}
    for name, owner in owners.items():
        text = (EMOJI / "LICENSES" / f"{name}.txt").read_text(encoding="utf-8")
        assert re.search(rf"Copyright \(c\).*{owner}", text)
        assert "Permission is hereby granted" in text


def test_card_states_the_numbers(rows: list[Row]) -> None:
    card = (EMOJI / "README.md").read_text(encoding="utf-8")
    for split, count in Counter(row["split"] for row in rows).items():
        assert f"| `{split}` | {count:,} |" in card
    assert all(row["concept"] in card for row in of_split(rows, "reserved"))


def test_builder_refuses_an_archive_with_other_bytes(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.tgz"
    wrong.write_bytes(b"not the package")
    script = REPOSITORY / "tools" / "build_emoji_data.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--fluent-tgz", str(wrong)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sha256" in done.stderr
    assert "wrong.tgz" in done.stderr
    assert not (tmp_path / "out").exists()
