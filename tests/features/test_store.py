from __future__ import annotations

import json
import pickle
from pathlib import Path

import datasets
import pytest
import torch

from diffusion.errors import DataError
from diffusion.features import FeatureRow, FeatureStore, FeatureStoreWriter

FINGERPRINT = {"text_encoder": "abc", "image_size": 64}
NULL = torch.linspace(-1, 1, 32).reshape(1, 32)


def make_row(number: int, bucket: tuple[int, int] = (64, 64)) -> FeatureRow:
    generator = torch.Generator().manual_seed(number)
    lengths = [1 + number % 5, 3]
    size = (4, bucket[0] // 8, bucket[1] // 8)
    return FeatureRow(
        key=f"images/é {number}.png",
        image_size=(70 + number, 64),
        bucket=bucket,
        crop_box=(0.0, 3.5, 64.0, 67.5),
        latents_mean=torch.randn(size, generator=generator),
        latents_std=torch.rand(size, generator=generator),
        captions=[f"caption {number}", "another"],
        caption_embeds=[torch.randn(length, 32, generator=generator) for length in lengths],
        attributes={"concept": f"c{number % 3}", "split": "train" if number % 4 else "heldout"},
    )


def write(root: Path, count: int, *, dtype: str = "bf16", rows_per_shard: int = 4) -> Path:
    writer = FeatureStoreWriter(root, FINGERPRINT, NULL, dtype=dtype, rows_per_shard=rows_per_shard)
    for number in range(writer.num_rows, count):
        writer.add(make_row(number, (64, 64) if number % 2 else (48, 80)))
    writer.close()
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_every_row_comes_back(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    store = FeatureStore(write(tmp_path / "s", 10, dtype=dtype), verify=True)
    assert len(store) == 10
    for number in (9, 0, 4, 3, 7):
        row, expected = store.row(number), make_row(number, (64, 64) if number % 2 else (48, 80))
        for name in ("key", "image_size", "bucket", "crop_box", "captions", "attributes"):
            assert getattr(row, name) == getattr(expected, name)
        tensors = [row.latents_mean, row.latents_std, *row.caption_embeds]
        for got, wanted in zip(tensors, [expected.latents_mean, expected.latents_std, *expected.caption_embeds]):
            assert got.dtype == torch_dtype
            assert torch.equal(got, wanted.to(torch_dtype))
    assert torch.equal(store.null_caption, NULL.to(torch_dtype))
    assert store.caption_channels == 32


def test_columns(tmp_path: Path) -> None:
    store = FeatureStore(write(tmp_path / "s", 10))
    assert store.attribute("concept") == [f"c{number % 3}" for number in range(10)]
    assert store.buckets() == [(48, 80), (64, 64)] * 5
    with pytest.raises(DataError, match="no attribute 'colour'; it has concept, split"):
        store.attribute("colour")
    with pytest.raises(IndexError):
        store.row(10)
    with pytest.raises(IndexError):
        store.row(-1)


def test_tensors_are_copies_that_may_be_written(tmp_path: Path) -> None:
    store = FeatureStore(write(tmp_path / "s", 3))
    store.row(1).latents_mean.zero_()
    assert torch.equal(store.row(1).latents_mean, make_row(1).latents_mean.bfloat16())


def test_store_can_be_sent_to_workers(tmp_path: Path) -> None:
    store = FeatureStore(write(tmp_path / "s", 6))
    before = store.row(5).latents_std
    assert torch.equal(pickle.loads(pickle.dumps(store)).row(5).latents_std, before)  # noqa: S301 - our own bytes


def test_shards_open_in_hugging_face_datasets(tmp_path: Path) -> None:
    root = write(tmp_path / "s", 6)
    dataset = datasets.Dataset.from_file(str(root / "shard-00000.arrow"))
    assert len(dataset) == 4
    item = dataset[2]
    assert item["key"] == make_row(2).key
    mean = torch.frombuffer(bytearray(item["latents_mean"]), dtype=torch.bfloat16)
    assert torch.equal(mean, make_row(2, (48, 80)).latents_mean.bfloat16().flatten())


@pytest.mark.parametrize("rows_before_the_kill", [0, 3, 4, 7, 9])
def test_interrupted_writing_continues_to_the_same_bytes(tmp_path: Path, rows_before_the_kill: int) -> None:
    whole = contents(write(tmp_path / "whole", 10))
    writer = FeatureStoreWriter(tmp_path / "cut", FINGERPRINT, NULL, rows_per_shard=4)
    for number in range(rows_before_the_kill):
        writer.add(make_row(number, (64, 64) if number % 2 else (48, 80)))
    del writer  # the process is gone: nothing is closed
    (tmp_path / "cut" / ".tmp-shard-00009.arrow").write_bytes(b"half")
    again = FeatureStoreWriter(tmp_path / "cut", FINGERPRINT, NULL, rows_per_shard=4)
    assert rows_before_the_kill - 4 < again.num_rows <= rows_before_the_kill
    with pytest.raises(DataError, match="interrupted"):
        FeatureStore(tmp_path / "cut")
    assert contents(write(tmp_path / "cut", 10)) == whole
    assert not list((tmp_path / "cut").glob(".tmp-*"))


def test_other_fingerprint_lists_each_differing_field(tmp_path: Path) -> None:
    write(tmp_path / "s", 2)
    with pytest.raises(DataError, match=r"image_size \(64, now 256\), vae \(None, now 'x'\)"):
        FeatureStoreWriter(tmp_path / "s", {**FINGERPRINT, "image_size": 256, "vae": "x"}, NULL)


@pytest.mark.parametrize("damage", ["empty", "truncated", "missing"])
def test_damaged_shard_is_named_on_opening(tmp_path: Path, damage: str) -> None:
    root = write(tmp_path / "s", 10)
    shard = root / "shard-00001.arrow"
    content = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(b"" if damage == "empty" else content[:-8])
    with pytest.raises(DataError, match=r"shard-00001\.arrow .*extract again"):
        FeatureStore(root)


def test_flipped_byte_is_found_by_verification(tmp_path: Path) -> None:
    root = write(tmp_path / "s", 10)
    shard = root / "shard-00002.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00002\.arrow is damaged"):
        FeatureStore(root, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 99}, "format version 99"), ({"shards": None}, "damaged"), (None, "missing"), ("{", "damaged")],
)
def test_damaged_manifest(tmp_path: Path, change: object, message: str) -> None:
    root = write(tmp_path / "s", 3)
    path = root / "manifest.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        manifest = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))
    with pytest.raises(DataError, match=message):
        FeatureStore(root)


def test_missing_null_caption(tmp_path: Path) -> None:
    root = write(tmp_path / "s", 3)
    (root / "null_caption.safetensors").unlink()
    with pytest.raises(DataError, match="null_caption"):
        FeatureStore(root)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bf16"), (float("inf"), "fp32"), (1e6, "fp16")])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: str) -> None:
    writer = FeatureStoreWriter(tmp_path / "s", FINGERPRINT, NULL, dtype=dtype)
    row = make_row(1)
    row.caption_embeds[1][0, 0] = value
    with pytest.raises(DataError, match=r"1\.png: caption_embeds\[1\] is not finite"):
        writer.add(row)


def test_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no features"):
        FeatureStore(write(tmp_path / "s", 0))
