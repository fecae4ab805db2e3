"""500 generated hostile inputs: each is a sample, a rejection with a reason, or one DataError; never a traceback."""

from __future__ import annotations

import json
import random
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import DataError
from diffusion.features import ExtractionSettings, FeatureStore, extract_folder
from diffusion.features.report import check_source
from diffusion.features.sources import Rejected, open_source
from diffusion.features.stages import decode_sample
from diffusion.text import MAX_CAPTION_CHARS
from tests.tiny import write_tiny_pipeline_parts

SETTINGS = ExtractionSettings(image_size=32, dtype="fp32")
CASES = 500


def noise(rng: random.Random, width: int = 24, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def bomb_png(side: int) -> bytes:
    """A small PNG whose header promises side x side pixels."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    data = b"IDAT" + zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    )


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def mutated(rng: random.Random, path: Path, suffix: str) -> None:
    noise(rng).save(path, format=suffix)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def cut(rng: random.Random, path: Path, suffix: str) -> None:
    noise(rng).save(path, format=suffix)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


PICTURES: dict[str, Callable[[random.Random, Path], object]] = {
    "good": lambda rng, path: noise(rng).save(path),
    "empty": lambda rng, path: path.write_bytes(b""),
    "html": lambda rng, path: path.write_bytes(b"<html>404</html>"),
    "cut_jpeg": lambda rng, path: cut(rng, path, "JPEG"),
    "cut_png": lambda rng, path: cut(rng, path, "PNG"),
    "cut_webp": lambda rng, path: cut(rng, path, "WEBP"),
    "cut_gif": lambda rng, path: cut(rng, path, "GIF"),
    "mutated_jpeg": lambda rng, path: mutated(rng, path, "JPEG"),
    "mutated_png": lambda rng, path: mutated(rng, path, "PNG"),
    "mutated_webp": lambda rng, path: mutated(rng, path, "WEBP"),
    "mutated_tiff": lambda rng, path: mutated(rng, path, "TIFF"),
    "mutated_bmp": lambda rng, path: mutated(rng, path, "BMP"),
    "cmyk": lambda rng, path: noise(rng).convert("CMYK").save(path, format="JPEG"),
    "grey16": lambda rng, path: Image.fromarray(np.full((9, 7), 40_000, np.uint16)).save(path, format="PNG"),
    "float": lambda rng, path: Image.fromarray(np.full((9, 7), 0.5, np.float32)).save(path, format="TIFF"),
    "palette": lambda rng, path: noise(rng).convert("P").save(path, format="PNG", transparency=3),
    "alpha": lambda rng, path: noise(rng).convert("RGBA").save(path, format="PNG"),
    "animated": lambda rng, path: noise(rng).save(path, format="GIF", save_all=True, append_images=[noise(rng)]),
    "turned": lambda rng, path: noise(rng).save(path, format="JPEG", exif=exif(rng.randrange(12))),
    "bad_exif": lambda rng, path: noise(rng).save(path, format="JPEG", exif=b"Exif\0\0" + rng.randbytes(40)),
    "bad_profile": lambda rng, path: noise(rng).save(path, format="PNG", icc_profile=rng.randbytes(200)),
    "thin": lambda rng, path: Image.new("RGB", (1, 20_000), "red").save(path, format="PNG"),
    "dot": lambda rng, path: Image.new("L", (1, 1)).save(path, format="PNG"),
    "bomb": lambda rng, path: path.write_bytes(bomb_png(rng.choice([9_000, 30_000, 1 << 30]))),
    "folder": lambda rng, path: path.mkdir(),
}
CAPTIONS: list[Any] = [
    "a cat",
    "",
    "   ",
    "x" * 100_000,
    "word " * 30_000,
    "\0\x07\x1b[31m red",
    "\u202eevil\u202c שלום",
    "<b>&amp;lt;script&amp;gt;</b>" * 50,
    "🍎" * 500,
    "\ud800 lone",
    "a\u0301" * 3_000,
    None,
    7,
    ["a"],
    {"a": 1},
]
NAMES = [
    "a.png", "b c.png", "é.png", "e\u0301.png", "#%&'.jpg", "a\tb.png", "../up.png", "/etc/passwd", "x/../a.png",
    "\0.png", "n" * 300 + ".png", "", " ", ".", "gone.png", "A.PNG", "C:\\a.png", "..\\a.png", "d/é/a.webp",
]  # fmt: skip
BROKEN_LINES = [
    "{", "[]", "null", '{"file_name": 3}', '{"file_name": "a.png"', "\ufeff", '{"file_name": "a.png", "text": NaN}',
    "[" * 20_000, '"a.png"', '{"file_name": ["a.png"]}', "{}" * 3,
]  # fmt: skip


def write_picture(rng: random.Random, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                PICTURES[rng.choice(list(PICTURES))](rng, path)
    except (OSError, ValueError):  # the name itself is impossible on this disk
        pass


def make_case(rng: random.Random, root: Path) -> Path:
    """A source with a few pictures, of a random layout, most of it broken."""
    root.mkdir()
    names = rng.sample(NAMES, 3)
    safe = [name for name in names if name.strip(" .") and ".." not in name and not name.startswith(("/", "C:"))]
    for name in safe:
        write_picture(rng, root / name)
    rows = [{"file_name": name, "path": name, "text": rng.choice(CAPTIONS)} for name in names]
    if rng.random() < 0.3:
        rows[0] |= {"captions": [rng.choice(CAPTIONS)], "weights": rng.choice([[1], [-1], "x", [1, 2]])}
    layout = rng.choice(["jsonl", "csv", "txt", "list", "sam"])
    if layout == "jsonl":
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
        lines.insert(rng.randrange(4), rng.choice(BROKEN_LINES))
        (root / "metadata.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    elif layout == "csv":
        text = "file_name,text\n" + "\n".join(f"{name},{row['text']}" for name, row in zip(names, rows))
        (root / "metadata.csv").write_bytes((text + rng.choice(["", '\n"', "\n,,,,"])).encode("utf-8", "replace"))
    elif layout == "list":
        content = json.dumps(rows)
        (root / "data_info.json").write_text(content[: rng.choice([len(content), len(content) // 2])])
    else:
        captions = root / "captions" if layout == "sam" else root
        captions.mkdir(exist_ok=True)
        for name in safe:
            try:
                target = (captions / name).with_suffix(".txt")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(str(rng.choice(CAPTIONS)).encode("utf-8", "surrogatepass"))
            except (OSError, ValueError):
                continue
        if layout == "sam":
            (root / "images").mkdir(exist_ok=True)
            (root / "partition").mkdir()
            (root / "partition" / "part0.txt").write_bytes("\n".join(names).encode("utf-8", "surrogatepass"))
    return root


def test_every_hostile_input_is_a_sample_or_a_reason(tmp_path: Path) -> None:
    outcomes = {"sample": 0, "rejected": 0, "refused": 0, "undecodable": 0}
    for number in range(CASES):
        rng = random.Random(number)
        root = make_case(rng, tmp_path / str(number))
        try:
            source = open_source(root)
        except DataError:
            outcomes["refused"] += 1
            continue
        outcomes["rejected"] += len(source.rejected)
        assert all(item.reason for item in source.rejected)
        for sample in source.samples:
            assert all(0 < len(caption) <= MAX_CAPTION_CHARS for caption in sample.captions)
            result = decode_sample(sample, SETTINGS)
            if isinstance(result, Rejected):
                assert Path(root).name in result.reason
                outcomes["undecodable"] += 1
            else:
                assert result.pixels.shape == (32, 32, 3)
                outcomes["sample"] += 1
        check_source(source, SETTINGS, tmp_path / "no encoders")
    # The generator reaches every outcome often: otherwise it would test nothing.
    assert min(outcomes.values()) > 40, outcomes


@pytest.mark.parametrize("kinds", [sorted(PICTURES)])
def test_what_is_rejected_is_counted_and_listed_and_nothing_takes_its_place(tmp_path: Path, kinds: list[str]) -> None:
    rng = random.Random(1)
    source = tmp_path / "src"
    source.mkdir()
    for kind in kinds:
        write = PICTURES[kind]
        write(rng, source / f"{kind}.png")
        (source / f"{kind}.txt").write_text(f"picture of {kind}")
    pipeline = write_tiny_pipeline_parts(tmp_path / "pipeline")
    counts = extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu", max_rejected=1.0)
    store = FeatureStore(tmp_path / "out", verify=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    kept = {key.removesuffix(".png") for key in store.column("key")}
    assert {"good", "cmyk", "grey16", "palette", "alpha", "animated", "turned", "thin", "dot"} <= kept
    assert {"empty", "html", "bomb", "float", "cut_jpeg", "cut_png", "folder"}.isdisjoint(kept)
    assert len(kept) + len(lines) == len(kinds)
    assert counts["rejected"] == len(lines)
    assert all(
        row.captions == [f"picture of {row.key.removesuffix('.png')}"] for row in map(store.row, range(len(store)))
    )
