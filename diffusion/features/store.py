"""The feature store: Arrow shards, a manifest, and T5("").

    DIR/manifest.json            format, fingerprint, dtype, shards with rows, bytes and hash
    DIR/shard-00000.arrow ...    Arrow IPC streams; Hugging Face `datasets.Dataset.from_file` opens them too
    DIR/null_caption.safetensors T5("") with its own length

A shard is written aside, synced and renamed before the manifest names it, so an interrupted extraction loses at most
the shard it was working on. Reading maps the files; a random sample costs a fraction of a millisecond.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffusion.errors import DataError
from diffusion.features.rows import DTYPES, SCHEMA, FeatureRow, from_buffer, to_batch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NULL_CAPTION = "null_caption.safetensors"
_REMEDY = "extract again with tools/extract_features.py"


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_manifest(root: Path) -> dict[str, Any]:
    """Content of DIR/manifest.json.

    Raises:
        DataError: missing, damaged or of a newer format.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{root} is no feature store: {MANIFEST} is missing; {_REMEDY}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); {_REMEDY}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; {_REMEDY}")
    missing = {"dtype", "caption_channels", "fingerprint", "complete", "shards"} - set(manifest)
    if missing:
        raise DataError(f"{path} is damaged (without {', '.join(sorted(missing))}); {_REMEDY}")
    return manifest


def check_fingerprint(root: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse features made by other encoders or settings.

    Raises:
        DataError: every field that differs.
    """
    differing = [
        f"{name} ({stored.get(name)!r}, now {wanted.get(name)!r})"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if differing:
        raise DataError(f"{root} holds features made otherwise: {', '.join(differing)}; extract into another folder")


class FeatureStoreWriter:
    """Appends rows to a new or interrupted store.

    Args:
        root: the store's folder.
        fingerprint: everything that determines the features; must equal that of an existing store.
        null_caption: (L0, C), T5("").
        dtype: "bf16", "fp16" or "fp32".
        rows_per_shard: rows a file.
    Raises:
        DataError: the folder holds a store with another fingerprint.
    """

    def __init__(
        self,
        root: str | Path,
        fingerprint: Mapping[str, Any],
        null_caption: Tensor,
        *,
        dtype: str = "bf16",
        rows_per_shard: int = 512,
    ) -> None:
        self.root, self.dtype, self.rows_per_shard = Path(root), DTYPES[dtype], rows_per_shard
        self._pending: list[FeatureRow] = []
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(".tmp-*"):
            leftover.unlink()
        if (self.root / MANIFEST).exists():
            self.manifest = read_manifest(self.root)
            check_fingerprint(self.root, self.manifest["fingerprint"], dict(fingerprint))
        else:
            self.manifest = {
                "format_version": FORMAT_VERSION,
                "dtype": dtype,
                "caption_channels": null_caption.shape[1],
                "fingerprint": dict(fingerprint),
                "complete": False,
                "shards": [],
            }
            content = save({"null_caption": null_caption.to("cpu", self.dtype).contiguous()})
            write_atomically(self.root / NULL_CAPTION, content)
            self._write_manifest()

    @property
    def num_rows(self) -> int:
        """Rows that are safely on disk."""
        return sum(shard["rows"] for shard in self.manifest["shards"])

    def add(self, row: FeatureRow) -> None:
        """Append a row; every `rows_per_shard` rows are committed.

        Raises:
            DataError: the features are not finite.
        """
        row.check(self.dtype)
        self._pending.append(row)
        if len(self._pending) == self.rows_per_shard:
            self._commit()

    def close(self) -> None:
        """Commit what is left and mark the store complete."""
        if self._pending:
            self._commit()
        self.manifest["complete"] = True
        self._write_manifest()

    def _commit(self) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_batch(to_batch(self._pending, self.dtype))
        content = sink.getvalue().to_pybytes()
        name = f"shard-{len(self.manifest['shards']):05d}.arrow"
        write_atomically(self.root / name, content)
        entry = {"name": name, "rows": len(self._pending), "bytes": len(content)}
        self.manifest["shards"].append({**entry, "xxh3_128": xxhash.xxh3_128_hexdigest(content)})
        self._write_manifest()
        self._pending = []

    def _write_manifest(self) -> None:
        write_atomically(self.root / MANIFEST, (json.dumps(self.manifest, indent=1) + "\n").encode())


class FeatureStore:
    """Random access to a store; picklable, so that data-loading workers map the files themselves.

    Args:
        root: the store's folder.
        verify: also hash every shard (seconds a GB).
    Raises:
        DataError: no store there, an extraction that was not finished, or a shard that is missing, truncated or
            (with verify) damaged.
    """

    def __init__(self, root: str | Path, *, verify: bool = False) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.caption_channels: int = self.manifest["caption_channels"]
        for shard in self.manifest["shards"]:
            self._check(shard, verify)
        self._ends = list(accumulate(shard["rows"] for shard in self.manifest["shards"]))
        self._tables: dict[int, pa.Table] = {}
        self.null_caption = self._read_null_caption()
        if not self.manifest["complete"]:
            raise DataError(
                f"{self.root} holds {sum(shard['rows'] for shard in self.manifest['shards'])} rows of an extraction "
                "that was interrupted; run the same tools/extract_features.py command again to finish it"
            )
        if not self._ends:
            raise DataError(f"{self.root} holds no features yet; {_REMEDY}")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def row(self, index: int) -> FeatureRow:
        """Everything about a sample."""
        table, position = self._locate(index)
        values = {name: table.column(name)[position].as_py() for name in ("key", "captions", "attributes")}
        boxes = {name: tuple(table.column(name)[position].as_py()) for name in ("image_size", "bucket", "crop_box")}
        mean, std = self.latents(index)
        embeds = [self.caption(index, number) for number in range(len(values["captions"]))]
        return FeatureRow(
            values["key"], boxes["image_size"], boxes["bucket"], boxes["crop_box"], mean, std,
            values["captions"], embeds, {pair["name"]: pair["value"] for pair in values["attributes"]},
        )  # fmt: skip

    def latents(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a sample's latents, (C, h, w) each."""
        table, position = self._locate(index)
        shape = table.column("latent_shape")[position].as_py()
        mean, std = (table.column(name)[position].as_buffer() for name in ("latents_mean", "latents_std"))
        return from_buffer(mean, self.dtype, shape), from_buffer(std, self.dtype, shape)

    def caption(self, index: int, number: int) -> Tensor:
        """Embedding of one caption of a sample, (L, C), without padding."""
        table, position = self._locate(index)
        buffer = table.column("caption_embeds")[position].values[number].as_buffer()
        return from_buffer(buffer, self.dtype, (-1, self.caption_channels))

    def column(self, name: str) -> list[Any]:
        """A column of all rows: key, image_size, bucket, captions, ..."""
        return [value for number in range(len(self._ends)) for value in self._table(number).column(name).to_pylist()]

    def attribute(self, name: str) -> list[str]:
        """One attribute of every sample.

        Raises:
            DataError: a sample lacks it; lists those there are.
        """
        rows = [{pair["name"]: pair["value"] for pair in pairs} for pairs in self.column("attributes")]
        if any(name not in row for row in rows):
            raise DataError(f"{self.root} has no attribute {name!r}; it has {', '.join(sorted(rows[0])) or 'none'}")
        return [row[name] for row in rows]

    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) in px of every sample's bucket."""
        return [tuple(bucket) for bucket in self.column("bucket")]

    def num_captions(self) -> list[int]:
        """Captions of every sample."""
        return [len(captions) for captions in self.column("captions")]

    def _locate(self, index: int) -> tuple[pa.Table, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self._table(number), index - (self._ends[number - 1] if number else 0)

    def _table(self, number: int) -> pa.Table:
        if number not in self._tables:
            path = self.root / self.manifest["shards"][number]["name"]
            try:
                with pa.memory_map(str(path)) as source:
                    self._tables[number] = pa.ipc.open_stream(source).read_all().combine_chunks()
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{path} cannot be read ({error}); {_REMEDY}") from error
        return self._tables[number]

    def _read_null_caption(self) -> Tensor:
        path = self.root / NULL_CAPTION
        try:
            return load_file(path)["null_caption"]
        except (OSError, KeyError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); {_REMEDY}") from error

    def _check(self, shard: Mapping[str, Any], verify: bool) -> None:
        path = self.root / shard["name"]
        if not path.is_file():
            raise DataError(f"{path} is missing; {_REMEDY}")
        if path.stat().st_size != shard["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size} bytes instead of {shard['bytes']}: truncated; {_REMEDY}")
        if verify and xxhash.xxh3_128_hexdigest(path.read_bytes()) != shard["xxh3_128"]:
            raise DataError(f"{path} is damaged (its hash differs); {_REMEDY}")
