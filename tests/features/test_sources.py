from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion.errors import DataError
from diffusion.features.sources import read_folder


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def folder(root: Path, *rows: dict[str, Any], files: tuple[str, ...] = ("a.png", "b/c.png")) -> Path:
    for name in files:
        picture(root / name)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return root


A = {"file_name": "a.png", "text": "one"}
C = {"file_name": "b/c.png", "text": "three"}


def test_metadata_rows_in_their_order_with_all_captions_and_attributes(tmp_path: Path) -> None:
    rows = [
        {**C, "captions": ["three", "  drei &amp; 3 "], "split": "train", "count": 2, "nothing": None},
        {**A, "text": "with\u2028separator", "split": "test"},
    ]
    first, second = read_folder(folder(tmp_path, *rows))
    assert (first.key, first.picture.place) == ("b/c.png", str(tmp_path / "b" / "c.png"))
    assert first.captions == ("three", "drei & 3")
    assert first.attributes == {"split": "train", "count": "2", "nothing": ""}
    assert second.captions == ("with separator",)
    assert [sample.key for sample in read_folder(tmp_path, ["test"])] == ["a.png"]
    with pytest.raises(DataError, match="no pictures in split gone"):
        read_folder(tmp_path, ["gone"])


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    folder(tmp_path, A, C)
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_folder(tmp_path)) == 2


def test_pairs_of_picture_and_text(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "a.txt").write_text("a caption\n")
    (sample,) = read_folder(tmp_path)
    assert (sample.key, sample.captions) == ("x/a.png", ("a caption",))
    (tmp_path / "orphan.txt").write_text("nobody")
    with pytest.raises(DataError, match=r"orphan\.txt is a caption without a picture"):
        read_folder(tmp_path)
    (tmp_path / "orphan.txt").unlink()
    picture(tmp_path / "silent.png")
    with pytest.raises(DataError, match=r"silent\.png has no caption"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "gone.png", "text": "x"}, r"line 3: picture 'gone\.png' does not exist"),
        ({"file_name": "../a.png", "text": "x"}, "leaves"),
        ({"file_name": "b/../a.png", "text": "x"}, "leaves"),
        ({"file_name": "/etc/passwd", "text": "x"}, "leaves"),
        ({"file_name": "a\0.png", "text": "x"}, "leaves"),
        ({"file_name": "a.png", "text": "x"}, "listed twice"),
        ({"file_name": "d.png"}, "has no caption"),
        ({"file_name": "d.png", "text": "", "captions": None}, "has no caption"),
        ({"file_name": "d.png", "text": 3}, "must be a string"),
        ({"file_name": "d.png", "text": "x", "captions": "abc"}, "captions a list"),
        ({"text": "x"}, "no file_name"),
        ([1, 2], "no file_name"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: Any, message: str) -> None:
    folder(tmp_path, A, C, row, files=("a.png", "b/c.png", "d.png"))
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path)
    assert "line 3" in str(caught.value)


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b'{"file_name": "a.png", "text": "\xff"}'])
def test_lines_that_are_not_json(tmp_path: Path, line: bytes) -> None:
    folder(tmp_path, A)
    (tmp_path / "metadata.jsonl").write_bytes(line)
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_folder(tmp_path)


def test_unlisted_picture_is_an_error_and_hidden_files_are_not(tmp_path: Path) -> None:
    folder(tmp_path, A, C, files=("a.png", "b/c.png", ".thumbs/a.png"))
    assert len(read_folder(tmp_path)) == 2
    picture(tmp_path / "more.png")
    with pytest.raises(DataError, match=r"picture .more\.png. has no caption"):
        read_folder(tmp_path)


def test_same_name_after_unicode_normalisation(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    picture(tmp_path / decomposed)
    (sample,) = read_folder(folder(tmp_path, {"file_name": composed, "text": "x"}, files=()))
    assert sample.key == composed
    picture(tmp_path / composed)
    if len(os.listdir(tmp_path)) == 3:  # some file systems normalise by themselves
        with pytest.raises(DataError, match="same name after Unicode"):
            read_folder(tmp_path)


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    picture(tmp_path / "outside.png")
    (tmp_path / "in").mkdir()
    root = folder(tmp_path / "in", {"file_name": "link.png", "text": "x"}, files=())
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(DataError, match="leaves"):
        read_folder(root)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
