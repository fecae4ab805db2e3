from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusion.features import ExtractionSettings
from diffusion.features.concepts import content_words
from diffusion.features.report import check_source, contact_sheet
from diffusion.features.sources import open_source
from tests.doors import Door
from tests.tiny import write_tiny_pipeline_parts


def source(root: Path) -> Path:
    sizes = {"a": (300, 300), "b": (100, 400), "x/a": (600, 300), "c": (300, 300)}
    captions = {"a": "A red fox", "b": "the fox and the red hen", "x/a": "A red fox", "c": "w " * 400}
    for name, size in sizes.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(path)
        path.with_suffix(".txt").write_text(captions[name])
    (root / "bad.png").write_bytes(b"broken")
    (root / "bad.txt").write_text("a picture")
    Image.new("RGB", (8, 8)).save(root / "silent.png")
    return root


def test_figures(tmp_path: Path) -> None:
    found = open_source(source(tmp_path / "src"))
    pipeline = write_tiny_pipeline_parts(tmp_path / "pipeline")
    settings = ExtractionSettings(256, multi_scale=True)
    report = check_source(found, settings, pipeline, measure=True, device="cpu")
    assert (report.pictures, report.checked, report.decoded) == (5, 5, 5)
    assert [item.reason.split(": ")[0].split("/")[-1] for item in report.rejected] == [
        "silent.png has no caption; write silent.txt beside it, or a metadata.jsonl", "bad.png",
    ]  # fmt: skip
    assert report.sizes == (100, 300, 300)
    assert report.buckets == {"256x256": 2, "128x512": 1, "352x176": 1}
    assert report.small == 1  # 100 x 400 in 128 x 512
    assert (report.captions, report.duplicate_captions) == (5, 1)
    assert report.cut_captions == 1
    assert report.cut_tokens is not None and report.cut_tokens > 200
    assert report.tokens is not None and report.tokens > report.cut_tokens + 120
    assert (report.different_words, report.words_per_caption) == (4, (2 + 3 + 2 + 0 + 1) / 5)
    assert report.same_stems == 2
    assert report.bytes_estimated is not None and 5 * 2 * 4 * 24 * 24 < report.bytes_estimated < 200_000
    assert report.seconds_extracting is not None and report.seconds_extracting > 0
    assert json.loads(report.to_json())["small"] == 1


def test_without_encoders_the_rest_is_reported(tmp_path: Path) -> None:
    report = check_source(open_source(source(tmp_path)), ExtractionSettings(256), tmp_path / "none")
    assert (report.pictures, report.tokens, report.bytes_estimated) == (5, None, None)
    assert any(line.startswith("unusable") and "bad.png" in line for line in report.lines())


def test_contact_sheet_shows_pictures_as_they_are_cropped(tmp_path: Path) -> None:
    sheet = contact_sheet(open_source(source(tmp_path)).samples, ExtractionSettings(256))
    colors = {color: count for count, color in sheet.getcolors(maxcolors=1 << 16)}
    assert colors[(255, 0, 0)] == 4 * 160 * 160


def test_content_words() -> None:
    assert content_words("The quick FOX and a fox, 3 of them; café!") == {"quick", "fox", "café"}


def test_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheets" / "a.png"
    done = Door(monkeypatch, capsys)("tools/check_data.py", source(tmp_path / "src"), "--sheet", sheet)
    assert done.returncode == 2
    assert done.stderr == ""
    assert "folder of pictures with .txt, 5 pictures with captions, 2 unusable" in done.stdout
    assert Image.open(sheet).width > 300
