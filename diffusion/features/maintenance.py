"""Whole stores: verify, migrate, merge, split. Each writes a new store or replaces the manifest in one rename."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusion.errors import DataError
from diffusion.features.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    REJECTED,
    check_fingerprint,
    read_manifest,
    read_rejections,
    write_manifest,
)
from diffusion.features.rows import FeatureRow, upgrade
from diffusion.features.store import FeatureStore
from diffusion.features.writer import FeatureStoreWriter, write_arrow
from diffusion.files import FolderLock


@dataclass(frozen=True)
class StoreSummary:
    """Figures of a store; `captions` counts all captions of all rows."""

    rows: int
    captions: int
    bytes: int
    buckets: dict[tuple[int, int], int]
    format_version: int
    rejected: int


def summarize(store: FeatureStore) -> StoreSummary:
    rejected = store.files.small(REJECTED)
    return StoreSummary(
        rows=len(store),
        captions=int(np.sum(store.index.column("num_captions").to_numpy())),
        bytes=sum(shard["bytes"] for shard in store.manifest["shards"]),
        buckets=dict(Counter(store.buckets())),
        format_version=store.manifest["format_version"],
        rejected=len(read_rejections(rejected)),
    )


def verify_store(root: str | Path) -> FeatureStore:
    """Hash every shard and the index, compare the index with the rows, and look at every feature.

    Raises:
        DataError: the first thing that is wrong.
    """
    store = FeatureStore(root, verify=True)
    if "index" in store.manifest:
        store.files.checked(store.manifest["index"], verify=True)
    keys: set[str] = set()
    for index, row in enumerate(rows_of(store)):
        if row.key in keys:
            raise DataError(f"{root}: row {index} repeats the key {row.key!r}; split the store without it")
        keys.add(row.key)
        row.check(store.dtype)
    if store.column("key") != [
        key for n in range(store.num_shards) for key in store.table(n).column("key").to_pylist()
    ]:
        raise DataError(f"{root}: the index does not list the rows of the shards; migrate a copy of the store anew")
    return store


def rows_of(store: FeatureStore, indices: Iterable[int] | None = None) -> Iterator[FeatureRow]:
    """Rows of a store, one after the other."""
    for index in range(len(store)) if indices is None else indices:
        yield store.row(index)


def migrate_store(root: str | Path) -> int:
    """Bring a store of an older format to the present one, in place; returns the version it had.

    Its features stay as they are: the fingerprint then says `preprocessing` "1", so they do not mix with pictures that
    are decoded otherwise today. New shards are written beside the old ones, and the manifest decides in one rename.

    Raises:
        DataError: no store, or an extraction that was not finished. WorkDirLockedError: somebody writes to it.
    """
    root = Path(root)
    version = read_manifest(root / MANIFEST)["format_version"]
    if version == FORMAT_VERSION:
        return version
    lock = FolderLock(root, "store")
    store = FeatureStore(root, verify=True)
    old = store.manifest["shards"]
    shards = []
    for number, shard in enumerate(old):
        name = shard["name"].replace(".arrow", ".1.arrow")
        shards.append(write_arrow(root / name, upgrade(store.table(number))))
    fingerprint = {name: value for name, value in store.fingerprint.items() if name not in _SOURCE_FIELDS}
    manifest = {
        **store.manifest,
        "format_version": FORMAT_VERSION,
        "fingerprint": {**fingerprint, "preprocessing": "1"},
        "shards": shards,
        "index": FeatureStoreWriter.write_index(root, shards),
    }
    write_manifest(root, manifest)
    for shard in old:
        (root / shard["name"]).unlink()
    lock.release()
    return version


# Version 1 put the whole source into the fingerprint; version 2 keeps it row by row.
_SOURCE_FIELDS = ("source", "pictures", "selection")


def merge_stores(roots: Sequence[str | Path], out: str | Path, *, prefixes: bool = False) -> int:
    """Write the rows of several stores, made alike, into a new one; returns their number.

    Args:
        prefixes: put the name of each store before its keys, so that equal keys of different stores stay apart.
    Raises:
        DataError: other fingerprints, a key that occurs twice, or `out` holds a store.
    """
    stores = [FeatureStore(root) for root in roots]
    names = [Path(store.root).name for store in stores]
    for store in stores[1:]:
        check_fingerprint(store.root, store.fingerprint, stores[0].fingerprint)
    owners: dict[str, str] = {}
    for store, name in zip(stores, names):
        for key in store.column("key"):
            full = f"{name}/{key}" if prefixes else key
            if full in owners:
                raise DataError(f"{owners[full]} and {store.root} both have {full!r}; merge with --prefixes")
            owners[full] = store.root
    writer = new_store(out, stores[0])
    for store, name in zip(stores, names):
        for row in rows_of(store):
            writer.add(replace(row, key=f"{name}/{row.key}") if prefixes else row)
    writer.close()
    return writer.num_rows


def split_store(
    root: str | Path, out: str | Path, *, by: str | None = None, parts: int | None = None
) -> dict[str, int]:
    """Write the rows of a store into several new ones below `out`; returns the number of rows of each.

    Args:
        by: an attribute; one store for each of its values. parts: so many stores of consecutive rows instead.
    Raises:
        DataError: no such attribute, more parts than rows, or a store is there already.
    """
    store = FeatureStore(root)
    if (by is None) == (parts is None):
        raise DataError("split needs either --by ATTRIBUTE or --parts N")
    if by is not None:
        labels = [label.replace("/", "_") or "none" for label in store.attribute(by)]
    else:
        assert parts is not None
        if not 1 <= parts <= len(store):
            raise DataError(f"--parts {parts} must be between 1 and the {len(store)} rows of {root}")
        labels = [f"part-{index * parts // len(store):03d}" for index in range(len(store))]
    counts: dict[str, int] = {}
    for label in sorted(set(labels)):
        writer = new_store(Path(out) / label, store)
        for row in rows_of(store, [index for index, other in enumerate(labels) if other == label]):
            writer.add(row)
        writer.close()
        counts[label] = writer.num_rows
    return counts


def new_store(out: str | Path, like: FeatureStore) -> FeatureStoreWriter:
    """A writer of an empty store with the fingerprint, dtype and null caption of another.

    Raises:
        DataError: `out` holds a store already.
    """
    if (Path(out) / MANIFEST).exists():
        raise DataError(f"{out} holds a store already; choose another folder")
    return FeatureStoreWriter(out, like.fingerprint, like.null_caption, dtype=like.manifest["dtype"])
