from __future__ import annotations

import http.server
import json
import pickle
import threading
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from PIL import Image
from safetensors.torch import save_file

from diffusion.data import AspectRatioBatchSampler, SampleKey, StoreDataset, build_dataset
from diffusion.errors import DataError
from diffusion.features import FeatureRow, FeatureStore, FeatureStoreWriter
from diffusion.features.exchange import export_original, export_webdataset, import_original, import_webdataset
from diffusion.features.maintenance import merge_stores, migrate_store, split_store, summarize, verify_store
from diffusion.features.manifest import MANIFEST
from diffusion.features.rows import INDEX_SCHEMA, SCHEMA, to_batch
from diffusion.features.sources import open_source
from diffusion.features.writer import to_arrow
from tests.doors import Door
from tests.features.test_store import FINGERPRINT, NULL, make_row, write


def same_rows(left: FeatureStore, right: FeatureStore) -> bool:
    """Everything but the row's hashes, which format 1 did not have."""
    if len(left) != len(right):
        return False
    for index in range(len(left)):
        a, b = left.row(index), right.row(index)
        tensors = zip(
            [a.latents_mean, a.latents_std, *a.caption_embeds], [b.latents_mean, b.latents_std, *b.caption_embeds]
        )
        names = ("key", "image_size", "bucket", "crop_box", "captions", "attributes")
        if any(getattr(a, name) != getattr(b, name) for name in names) or not all(
            torch.equal(x, y) for x, y in tensors
        ):
            return False
    return True


def write_version_1(root: Path, count: int, rows_per_shard: int = 4) -> Path:
    """A store as format version 1 wrote it: ten columns, no index, the whole source in the fingerprint."""
    root.mkdir(parents=True)
    shards = []
    for start in range(0, count, rows_per_shard):
        rows = [make_row(n, (64, 64) if n % 2 else (48, 80)) for n in range(start, min(start + rows_per_shard, count))]
        table = pa.Table.from_batches([to_batch(rows, torch.bfloat16)]).select(SCHEMA.names[:10])
        content = to_arrow(table)
        name = f"shard-{len(shards):05d}.arrow"
        (root / name).write_bytes(content)
        entry = {"name": name, "rows": len(rows), "bytes": len(content)}
        shards.append({**entry, "xxh3_128": xxhash.xxh3_128_hexdigest(content)})
    save_file({"null_caption": NULL.bfloat16()}, root / "null_caption.safetensors")
    manifest = {
        "format_version": 1, "dtype": "bf16", "caption_channels": 32, "complete": True, "shards": shards,
        "fingerprint": {**FINGERPRINT, "source": "s", "pictures": count, "selection": "t"},
    }  # fmt: skip
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


def test_version_1_is_read_and_migrated_without_a_change_of_its_rows(tmp_path: Path) -> None:
    old = FeatureStore(write_version_1(tmp_path / "old", 10), verify=True)
    new = FeatureStore(write(tmp_path / "new", 10))
    assert same_rows(old, new)
    assert old.buckets() == new.buckets()
    assert old.attribute("concept") == new.attribute("concept")
    with pytest.raises(
        DataError, match=r"format version 1; bring it to 2 with `python tools/feature_store\.py migrate"
    ):
        FeatureStoreWriter(tmp_path / "old", FINGERPRINT, NULL)
    assert migrate_store(tmp_path / "old") == 1
    migrated = verify_store(tmp_path / "old")
    assert same_rows(migrated, new)
    assert migrated.fingerprint == {**FINGERPRINT, "preprocessing": "1"}
    assert "index" in migrated.manifest
    assert len(list((tmp_path / "old").glob("shard-*"))) == 3
    assert migrate_store(tmp_path / "old") == 2


def test_a_migration_that_is_killed_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_version_1(tmp_path / "old", 10)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusion.features.maintenance.write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        migrate_store(root)
    monkeypatch.undo()
    assert len(FeatureStore(root, verify=True)) == 10
    migrate_store(root)
    verify_store(root)


def test_verify_finds_what_hashes_do_not(tmp_path: Path) -> None:
    root = write(tmp_path / "s", 10)
    assert summarize(verify_store(root)).captions == 20
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["shards"].append(manifest["shards"][0])
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="repeats the key"):
        verify_store(root)
    manifest["shards"] = manifest["shards"][1:]
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="index does not list the rows"):
        verify_store(root)
    manifest["shards"][0]["name"] = "../s/shard-00000.arrow"
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged"):
        FeatureStore(root)


def test_merge_and_split_are_inverse(tmp_path: Path) -> None:
    whole = FeatureStore(write(tmp_path / "whole", 11))
    assert split_store(whole.root, tmp_path / "parts", parts=3) == {"part-000": 4, "part-001": 4, "part-002": 3}
    parts = sorted((tmp_path / "parts").iterdir())
    assert merge_stores(parts, tmp_path / "again") == 11
    assert same_rows(whole, verify_store(tmp_path / "again"))
    counts = split_store(whole.root, tmp_path / "by", by="split")
    assert counts == {"heldout": 3, "train": 8}
    assert set(FeatureStore(tmp_path / "by" / "heldout").attribute("split")) == {"heldout"}
    with pytest.raises(DataError, match="--prefixes"):
        merge_stores([whole.root, tmp_path / "again"], tmp_path / "twice")
    assert merge_stores([whole.root, tmp_path / "again"], tmp_path / "twice", prefixes=True) == 22
    with pytest.raises(DataError, match="holds a store already"):
        merge_stores(parts, tmp_path / "again")
    other = FeatureStoreWriter(tmp_path / "other", {**FINGERPRINT, "image_size": 128}, NULL)
    other.add(make_row(1))
    other.close()
    with pytest.raises(DataError, match=r"image_size \(128, now 64\)"):
        merge_stores([whole.root, tmp_path / "other"], tmp_path / "mixed")


def test_webdataset_round_trip(tmp_path: Path) -> None:
    store = FeatureStore(write(tmp_path / "s", 10))
    assert export_webdataset(store.root, tmp_path / "tars", rows_per_tar=4) == 10
    assert import_webdataset(tmp_path / "tars", tmp_path / "back") == 10
    back = verify_store(tmp_path / "back")
    assert same_rows(store, back)
    assert torch.equal(store.null_caption, back.null_caption)
    tar = tmp_path / "tars" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"000001\.tar is no tar of features"):
        import_webdataset(tmp_path / "tars", tmp_path / "more")


def test_a_key_that_leaves_the_folder_is_not_exported(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "s", FINGERPRINT, NULL)
    row = make_row(0)
    row.key = "0.tar/../../../stolen/a.png"
    writer.add(row)
    writer.close()
    with pytest.raises(DataError, match=r"stolen.* leaves"):
        export_original(tmp_path / "s", tmp_path / "out" / "o")
    assert not list(tmp_path.rglob("*.np[yz]"))


def test_original_layout_round_trip_and_training_on_it(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "s", {"image_size": 64, "multi_scale": False}, NULL, dtype="fp32")
    for number in range(5):
        writer.add(make_row(number))
        picture = tmp_path / "pictures" / f"images/é {number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(picture)
    writer.close()
    store = FeatureStore(tmp_path / "s")
    assert export_original(store.root, tmp_path / "o") == 5
    data = {"type": "InternalData", "root": "o", "image_list_json": ["data_info.json"]}
    data |= {"load_vae_feat": True, "load_t5_feat": True}
    dataset = build_dataset(
        data, image_size=64, aspect_ratio_type=None, model_max_length=120, seed=0, data_root=tmp_path
    )
    for number in range(5):
        sample, row = dataset[SampleKey(number, number)], store.row(number)
        assert torch.equal(sample.latents_mean, row.latents_mean)
        assert torch.equal(sample.caption_embeds, row.caption_embeds[0])
    source = open_source(tmp_path / "o/partition/data_info.json", dataset_root=tmp_path / "pictures")
    assert import_original(source, tmp_path / "o", tmp_path / "back", image_size=64, multi_scale=False) == 5
    back = verify_store(tmp_path / "back")
    assert torch.equal(back.row(3).latents_std, store.row(3).latents_std)
    assert back.row(3).captions == ["caption 3"]
    (tmp_path / "o/caption_feature_wmask/images_é 3.npz").unlink()
    with pytest.raises(DataError, match=r"no feature file images_é 3\.npz"):
        import_original(source, tmp_path / "o", tmp_path / "more", image_size=64, multi_scale=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real HTTP server of `tmp_path`/www."""
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "www")) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_store_is_read_from_a_url(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path / "cache"))
    local = FeatureStore(write(tmp_path / "www" / "s", 10))
    store = FeatureStore(f"{server}/s")
    assert store.attribute("concept") == local.attribute("concept")
    copies = list((tmp_path / "cache").rglob("*shard*"))
    assert copies == []  # opening fetches no rows
    assert store.row(9).key == local.row(9).key
    assert len(list((tmp_path / "cache").rglob("*shard*"))) == 1  # and reading only the shards that are needed
    assert same_rows(local, pickle.loads(pickle.dumps(store)))  # noqa: S301 - our own bytes
    data = {"type": "Store", "root": f"{server}/s"}
    options = {"image_size": 64, "aspect_ratio_type": None, "model_max_length": 120, "seed": 0, "data_root": "/nowhere"}
    assert len(build_dataset(data, **options)) == 10
    # A server whose file changed under the same manifest, and one that is gone.
    shard = tmp_path / "www" / "s" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path / "cache2"))
    with pytest.raises(DataError, match=r"shard-00001\.arrow arrived damaged"):
        FeatureStore(f"{server}/s").row(5)
    with pytest.raises(DataError, match="is no feature store"):
        FeatureStore(f"{server}/nothing")
    with pytest.raises(DataError, match="cannot be fetched"):
        FeatureStore("http://127.0.0.1:9/s")
    with pytest.raises(DataError, match="cannot be fetched"):
        FeatureStore("nosuchprotocol://host/s")


def test_a_million_rows_open_and_shuffle_quickly_in_little_memory(tmp_path: Path) -> None:
    count, root = 1_000_000, tmp_path / "s"
    writer = FeatureStoreWriter(root, FINGERPRINT, NULL)
    writer.add(make_row(0))
    writer.close()
    numbers = np.arange(count)
    pairs = np.stack([np.full(count, 64), np.where(numbers % 3, 64, 48)], axis=1).astype(np.int32).reshape(-1)
    sizes = pa.FixedSizeListArray.from_arrays(pa.array(pairs), 2)
    offsets = pa.array(np.arange(count + 1, dtype=np.int32))
    names = pa.array(["split"]).take(pa.array(np.zeros(count, np.int32)))
    values = pa.array(["train"]).take(pa.array(np.zeros(count, np.int32)))
    struct = pa.StructArray.from_arrays([names, values], ["name", "value"])
    columns = [pa.array([f"{n:07d}.jpg" for n in numbers]), sizes, sizes, pa.ListArray.from_arrays(offsets, struct)]
    index = pa.table([*columns, pa.array(np.ones(count, np.int32))], schema=INDEX_SCHEMA)
    content = to_arrow(index)
    (root / "index-big.arrow").write_bytes(content)
    manifest = json.loads((root / MANIFEST).read_text())
    entry = {"bytes": len(content), "xxh3_128": "", "rows": count}
    manifest["index"] = {**manifest["index"], **entry, "name": "index-big.arrow"}
    manifest["shards"][0]["rows"] = count  # the shard is not opened in this test
    (root / MANIFEST).write_text(json.dumps(manifest))
    del columns, index, content, struct, names, values
    opened = []
    for _ in range(3):  # processor time, the least of three: another program beside this one must not count
        started = time.process_time()
        dataset = StoreDataset(root, split="train")
        opened.append(time.process_time() - started)
    tracemalloc.start()
    plan = AspectRatioBatchSampler(dataset.buckets, batch_size=256).plan(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, plan)) >= count
    assert min(opened) < 1.0
    assert peak < 100e6


def test_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root, door = write(tmp_path / "s", 5), Door(monkeypatch, capsys)
    done = door("tools/feature_store.py", "verify", root)
    assert "5 pictures, 10 captions" in done.stdout, done.stderr
    assert "all hashes and features are right" in done.stdout
    shard = root / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    failed = door("tools/feature_store.py", "verify", root)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "truncated" in failed.stderr


def test_rows_hold_what_format_2_added(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "s", FINGERPRINT, NULL)
    row = make_row(1)
    row.caption_weights, row.source_hash, row.source_stat, row.record_hash = [3.0, 1.0], "h", "1:2", "r"
    writer.add(row)
    writer.close()
    read: FeatureRow = FeatureStore(tmp_path / "s").row(0)
    assert (read.caption_weights, read.source_hash, read.source_stat, read.record_hash) == ([3.0, 1.0], "h", "1:2", "r")
    dataset = StoreDataset(tmp_path / "s")
    first = sum(torch.equal(dataset[SampleKey(0, n)].caption_embeds, read.caption_embeds[0]) for n in range(400))
    assert 270 < first < 330
