from __future__ import annotations

import io
import json
import logging
import os
import random
import tarfile
import time
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion.errors import DataError
from diffusion.features.sources import Source, open_source
from tests.checkpoints.hub_server import running_hub


def picture(path: Path, color: str = "red", size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def summary(source: Source) -> list[tuple[str, tuple[str, ...]]]:
    """Every picture is really decoded, so that what an adapter points at is a picture."""
    assert all(sample.decode().size == (8, 6) for sample in source.samples)
    return [(sample.key, sample.captions) for sample in source.samples]


def test_csv_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "a b.png")
    picture(tmp_path / "c.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text,split\n"a b.png","one, two",train\nc.png,"a\nline",test\nc.png\n'
    )
    source = open_source(tmp_path)
    assert summary(source) == [("a b.png", ("one, two",)), ("c.png", ("a line",))]
    (rejected,) = source.rejected
    assert "metadata.csv line 5" in rejected.reason
    assert [s.key for s in open_source(tmp_path, ["test"]).samples] == ["c.png"]


def test_captions_carry_weights_and_equal_ones_are_one(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "x", "captions": ["x", " y ", "y"], "weights": [3, 1, 0.5]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (sample,) = open_source(tmp_path).samples
    assert (sample.captions, sample.weights) == (("x", "y"), (3.0, 1.5))
    for weights in ([1], [1, 2, 0], "abc", [1, 2, None], [1, 2, float("inf")]):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, "weights": weights}))
        with pytest.raises(DataError, match="line 1: weights must be one positive number"):
            open_source(tmp_path)


def test_json_list_of_the_original(tmp_path: Path) -> None:
    picture(tmp_path / "InternImgs" / "d" / "a.jpg")
    items = [
        {"height": 6, "width": 8, "ratio": 0.75, "path": "d/a.jpg", "prompt": "p", "sharegpt4v": "long"},
        {"height": 6, "width": 8, "ratio": 0.75, "path": "d/gone.jpg", "prompt": "p"},
        {"path": "../a.jpg", "prompt": "p"},
        {"prompt": "p"},
        3,
    ]
    (tmp_path / "partition").mkdir()
    (tmp_path / "partition" / "data_info.json").write_text(json.dumps(items))
    for place in (tmp_path, tmp_path / "partition" / "data_info.json"):
        source = open_source(place)
        assert summary(source) == [("d/a.jpg", ("p", "long"))]
        assert source.samples[0].attributes == {"height": "6", "width": "8", "ratio": "0.75"}
        reasons = [item.reason for item in source.rejected]
        assert [f"item {number}" in reason for number, reason in enumerate(reasons, 1)] == [True] * 4
        assert ["does not exist" in reasons[0], "leaves" in reasons[1], "missing" in reasons[2]] == [True] * 3
    (tmp_path / "partition" / "data_info.json").write_text('[\n{"path": "a"},\n{]')
    with pytest.raises(DataError, match=r"data_info\.json line 3 is not JSON"):
        open_source(tmp_path)


def test_sam_layout_with_and_without_partition(tmp_path: Path) -> None:
    for name in ("sa_1", "sa_2", "sa_3"):
        picture(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "captions").mkdir()
    for name in ("sa_1", "sa_2", "sa_9"):
        (tmp_path / "captions" / f"{name}.txt").write_text(f"about {name}")
    source = open_source(tmp_path)
    assert summary(source) == [("sa_1.jpg", ("about sa_1",)), ("sa_2.jpg", ("about sa_2",))]
    assert [item.reason.split("/")[-1] for item in source.rejected] == ["sa_3.txt", "sa_9.jpg does not exist"]
    (tmp_path / "partition").mkdir()
    (tmp_path / "partition" / "part0.txt").write_text("sa_2\n\n../sa_1\n")
    for place in (tmp_path, tmp_path / "partition" / "part0.txt"):
        source = open_source(place)
        assert [sample.key for sample in source.samples] == ["sa_2.jpg"]
        assert "part0.txt line 3" in source.rejected[0].reason


def test_sam_captions_in_the_archive_they_are_published_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("sa_1", "sa_2", "sa_000020/sa_3", "sa_4", "sa_5", "twice/sa_4"):
        picture(tmp_path / "images" / f"{name}.jpg")
    members = {f"all/sa_{number}.txt": f"about {number}".encode() for number in (9, 1, 3, 4, 5)}
    members |= {"all/again/sa_1.txt": b"second", "all/sa_5.txt": b"caf\xe9", "all/sa_2.json": b"{}"}
    archive = make_tar(tmp_path / "SA1B_caption.tar.gz", members, "w:gz")
    with caplog.at_level(logging.INFO):
        source = open_source(tmp_path)
    assert summary(source) == [("sa_000020/sa_3.jpg", ("about 3",)), ("sa_1.jpg", ("about 1",))]
    assert "6 captions, 3 of them of pictures that are here" in caplog.text
    reasons = {item.reason.removeprefix(str(tmp_path)) for item in source.rejected}
    assert {
        "/SA1B_caption.tar.gz!all/sa_4.txt: 'sa_4' and 'twice/sa_4' have this name; rename one",
        "/SA1B_caption.tar.gz!all/again/sa_1.txt: a second caption of 'sa_1'; remove one",
        "/SA1B_caption.tar.gz!all/sa_5.txt is not UTF-8 (byte 3); save it as UTF-8 text",
    } < reasons
    assert len(reasons) == 6  # sa_2 and both sa_4 have no caption

    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "sa_1.txt").write_text("my own words")
    (tmp_path / "partition").mkdir()
    (tmp_path / "partition" / "part0.txt").write_text("sa_1\nsa_000020/sa_3\n")
    assert summary(open_source(tmp_path)) == [("sa_1.jpg", ("my own words",)), ("sa_000020/sa_3.jpg", ("about 3",))]

    noise = {f"sa_{number}.txt": random.Random(number).randbytes(2000) for number in range(100)}
    archive.write_bytes(make_tar(tmp_path / "long.tar", {"sa_3.txt": b"three"} | noise, "w:gz").read_bytes()[:100_000])
    assert any("SA1B_caption.tar.gz is damaged behind" in item.reason for item in open_source(tmp_path).rejected)
    archive.write_bytes(b"no archive")
    with pytest.raises(DataError, match="SA1B_caption.tar.gz is no archive of captions"):
        open_source(tmp_path)


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_a_tar_stay_inside_and_texts_are_utf8(tmp_path: Path) -> None:
    image = picture(tmp_path / "p.png").read_bytes()
    members = {"../../a": b"one", "/etc/b": b"two", "c": b"caf\xe9", "./d": b"four"}
    both = {f"{name}.{kind}": part for name, text in members.items() for kind, part in (("png", image), ("txt", text))}
    source = open_source(make_tar(tmp_path / "0.tar", both))
    assert summary(source) == [("0.tar/./d.png", ("four",))]
    parts = ("leaves", "leaves", "c.txt is not UTF-8 (byte 3)")
    assert [part in item.reason for part, item in zip(parts, source.rejected)] == [True] * 3


def test_a_member_that_comes_twice_is_told(tmp_path: Path) -> None:
    image = picture(tmp_path / "p.png").read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.png", image), ("a.txt", b"one"), ("a.txt", b"two"), ("b.png", image)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = open_source(tmp_path / "0.tar")
    assert summary(source) == [("0.tar/a.png", ("one",))]
    assert any("0.tar!a.txt: a second member of this name" in item.reason for item in source.rejected)


def test_webdataset_tars(tmp_path: Path) -> None:
    image = picture(tmp_path / "p.png").read_bytes()
    members = {"x/a.png": image, "x/a.txt": b"one", "x/b.png": image, "x/b.json": b'{"caption": "two", "concept": "k"}'}
    make_tar(tmp_path / "0.tar", {**members, "x/c.txt": b"no picture", "x/d.png": image})
    make_tar(tmp_path / "1.tar", {"a.png": image, "a.txt": b"other", "a.json": b"["})
    (tmp_path / "p.png").unlink()
    source = open_source(tmp_path)
    assert summary(source) == [("0.tar/x/a.png", ("one",)), ("0.tar/x/b.png", ("two",))]
    assert source.samples[1].attributes == {"concept": "k"}
    assert [part in item.reason for part, item in zip(("no picture", "no caption", "not JSON"), source.rejected)] == [
        True
    ] * 3
    assert len(open_source(str(tmp_path / "*.tar")).samples) == 2
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").unlink()
    (tmp_path / "0.tar").write_bytes(content[: content.index(b"x/b.png") + 600])
    source = open_source(tmp_path / "0.tar")  # cut in the middle of the second picture
    assert len(source.samples) + len(source.rejected) >= 1
    for sample in source.samples[1:]:
        with pytest.raises(DataError, match="0.tar"):
            sample.decode()
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"0\.tar is no uncompressed tar"):
        open_source(tmp_path / "0.tar")


def test_parquet_and_saved_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [{"bytes": picture(tmp_path / f"{name}.png").read_bytes(), "path": None} for name in "ab"]
    columns = {"image": images, "text": ["one", "two"], "captions": [["eins"], []], "source": ["s", "t"]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "d" / "x.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for place in (tmp_path / "d", tmp_path / "d" / "x.parquet", str(tmp_path / "d" / "*.parquet"), tmp_path / "saved"):
        source = open_source(place)
        assert summary(source) == [("000000000", ("one", "eins")), ("000000001", ("two",))]
        assert source.samples[0].attributes == {"source": "s"}
    (tmp_path / "d" / "x.parquet").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(DataError, match="cannot be opened as a data set"):
        open_source(tmp_path / "d")


def ask(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does before the libraries are imported."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_data_set_of_the_hub_and_the_copy_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": [{"bytes": picture(tmp_path / "a.png").read_bytes(), "path": None}], "text": ["one"]})
    pq.write_table(table, tmp_path / "x.parquet")
    files = {"README.md": b"# tiny", "data/train-00000-of-00001.parquet": (tmp_path / "x.parquet").read_bytes()}
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with running_hub({"datasets/someone/tiny": files}) as hub:
        ask(hub.address, monkeypatch)
        assert summary(open_source("hub:someone/tiny")) == [("000000000", ("one",))]
        with pytest.raises(DataError, match=r"^nobody/nothing is no file or folder here and no data set that http"):
            open_source("hub:nobody/nothing")
    ask("http://127.0.0.1:9", monkeypatch)
    begun = time.monotonic()
    assert summary(open_source("hub:someone/tiny")) == [("000000000", ("one",))]
    with pytest.raises(DataError, match=r"^nobody/nothing is no file or folder here, and http\S+ could not be") as said:
        open_source("hub:nobody/nothing")
    assert time.monotonic() - begun < 8  # the library alone: 31 s for each
    assert "fetch http://127.0.0.1:9/datasets/nobody/nothing elsewhere and give its local path" in str(said.value)
    assert f"{tmp_path / 'cache'} (with HF_HUB_OFFLINE=1 nothing is asked)" in str(said.value)
    assert datasets.config.HF_HUB_OFFLINE is False
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        open_source("hub:nobody/nothing")


def test_a_data_set_as_the_hub_s_own_download_leaves_it(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": picture(tmp_path / "a.png").read_bytes(), "path": None}], "text": ["one"]})
    (tmp_path / "tiny/data").mkdir(parents=True)
    (tmp_path / "tiny/README.md").write_text("# tiny")
    pq.write_table(table, tmp_path / "tiny/data/train-00000-of-00001.parquet")
    assert summary(open_source(tmp_path / "tiny")) == [("000000000", ("one",))]


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="are no known source"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(DataError, match="no pictures with captions"):
        open_source(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder or file"):
        open_source(tmp_path / "nowhere*.tar")


def test_same_stem_in_two_folders_are_two_pictures(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        picture(tmp_path / folder / "a.jpg").with_suffix(".txt").write_text(folder)
    assert summary(open_source(tmp_path)) == [("x/a.jpg", ("x",)), ("y/a.jpg", ("y",))]


def test_a_pipe_is_no_picture_and_does_not_hang(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    os.mkfifo(tmp_path / "b.png")
    assert [sample.key for sample in open_source(tmp_path).samples] == ["a.png"]
