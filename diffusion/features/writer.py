"""Writing a store: blocks of rows in any order, by any number of processes, each block whole or absent.

    DIR/.blocks/00003.json       block 3 is done: its shard with rows, bytes and hash, and what was rejected
    DIR/.tmp-*                   being written

A block's shard is renamed into place before its entry is; `close` folds the entries into the manifest. What a killed
process leaves is a block without an entry, which is simply made again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from safetensors.torch import save
from torch import Tensor

from diffusion.errors import ConfigError, DataError
from diffusion.features.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    NULL_CAPTION,
    REJECTED,
    REMEDY,
    check_fingerprint,
    read_manifest,
    read_rejections,
    write_manifest,
)
from diffusion.features.rows import CONTROL_SCHEMA, DTYPES, SCHEMA, FeatureRow, index_of, schema_with_control, to_batch
from diffusion.features.sources import Rejected
from diffusion.features.stages import EncodedBlock
from diffusion.files import TEMPORARY, write_atomically

BLOCKS = ".blocks"
_STATE = ("key", "source_stat", "source_hash", "record_hash")


@dataclass(frozen=True)
class RowState:
    """What a stored row was made from; see `FeatureRow`."""

    source_stat: str
    source_hash: str
    record_hash: str


@dataclass
class BlockEntry:
    """A finished block: its shard (None when every row was rejected), the rejections, and counts for the report."""

    shard: dict[str, Any] | None
    rejected: list[dict[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class FeatureStoreWriter:
    """Adds rows to a new, interrupted or complete store.

    Args:
        root: the store's folder.
        fingerprint: everything that determines the features; must equal that of an existing store. None joins a store
            that another process has opened.
        null_caption: (L0, C), T5("").
        dtype: "bf16", "fp16" or "fp32".
        rows_per_shard: rows a file in `add`.
    Raises:
        DataError: the folder holds a store with another fingerprint, or of an older format.
    """

    def __init__(
        self,
        root: str | Path,
        fingerprint: Mapping[str, Any] | None,
        null_caption: Tensor,
        *,
        dtype: str = "bf16",
        rows_per_shard: int = 512,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")
        self.root, self.dtype, self.rows_per_shard = Path(root), DTYPES[dtype], rows_per_shard
        self._pending: list[FeatureRow] = []
        if fingerprint is not None:
            self._prepare(dict(fingerprint), null_caption, dtype)
        self.manifest = read_manifest(self.root / MANIFEST)
        self.entries = self._read_entries()
        self.rejected = self._read_rejected()

    def _prepare(self, fingerprint: dict[str, Any], null_caption: Tensor, dtype: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / BLOCKS).mkdir(exist_ok=True)
        for leftover in [*self.root.glob(f"{TEMPORARY}*"), *(self.root / BLOCKS).glob(f"{TEMPORARY}*")]:
            leftover.unlink()
        if (self.root / MANIFEST).exists():
            manifest = read_manifest(self.root / MANIFEST)
            if manifest["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"{self.root} has format version {manifest['format_version']}; bring it to {FORMAT_VERSION} with "
                    f"`python tools/feature_store.py migrate {self.root}`, or extract into another folder"
                )
            check_fingerprint(self.root, manifest["fingerprint"], fingerprint)
            return
        content = save({"null_caption": null_caption.to("cpu", self.dtype).contiguous()})
        write_atomically(self.root / NULL_CAPTION, content)
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "caption_channels": null_caption.shape[1],
            "fingerprint": fingerprint,
            "complete": False,
            "shards": [],
        }
        write_manifest(self.root, manifest)

    @property
    def num_rows(self) -> int:
        """Rows that are safely on disk."""
        return sum(shard["rows"] for shard in self._shards())

    def _shards(self) -> list[dict[str, Any]]:
        """Of the manifest, then of finished blocks."""
        blocks = [self.entries[number].shard for number in sorted(self.entries)]
        return [*self.manifest["shards"], *(shard for shard in blocks if shard is not None)]

    def free_numbers(self) -> Iterator[int]:
        """Numbers for new blocks, ascending: a run that was interrupted numbers its blocks as if it had not been."""
        first = len(self.manifest["shards"])
        taken = {int(shard["name"].split("-")[1].split(".")[0]) for shard in self.manifest["shards"]}
        return (n for n in count(max([first, *(number + 1 for number in taken)])) if n not in self.entries)

    def add(self, row: FeatureRow) -> None:
        """Append a row; every `rows_per_shard` rows become a block.

        Raises:
            DataError: the features are not finite.
        """
        row.check(self.dtype)
        self._pending.append(row)
        if len(self._pending) == self.rows_per_shard:
            self._flush()

    def _flush(self) -> None:
        self.commit_block(EncodedBlock(next(self.free_numbers()), self._pending))
        self._pending = []

    def commit_block(self, block: EncodedBlock) -> None:
        """Write a block: its shard, then its entry. Afterwards it survives everything but the loss of the disk.

        Raises:
            DataError: the features are not finite. OSError: the disk is full.
        """
        for row in block.rows:
            row.check(self.dtype)
        shard = None
        if block.rows:
            table = pa.Table.from_batches([to_batch(block.rows, self.dtype)])
            shard = write_arrow(self.root / f"shard-{block.number:05d}.arrow", table)
        entry = BlockEntry(shard, [asdict(item) for item in block.rejected], block.counts)
        self._write_entry(block.number, entry)

    def _write_entry(self, number: int, entry: BlockEntry) -> None:
        write_atomically(self.root / BLOCKS / f"{number:05d}.json", json.dumps(asdict(entry)).encode())
        self.entries[number] = entry

    def states(self) -> dict[str, RowState]:
        """What every stored row was made from, by key."""
        found: dict[str, RowState] = {}
        for shard in self._shards():
            columns = _read_shard(self.root, shard).select(list(_STATE)).to_pydict()
            for key, *state in zip(*(columns[name] for name in _STATE)):
                found[key] = RowState(*state)
        return found

    def remove(self, keys: Iterable[str]) -> int:
        """Take rows out of the store; their shards are written anew under other names. Returns how many there were."""
        unwanted, removed = set(keys), 0
        if not unwanted:
            return 0
        replaced: list[str] = []
        shards = list(self.manifest["shards"])
        for index, shard in enumerate(shards):
            shards[index], lost = self._without(shard, unwanted)
            removed += lost
            replaced += [shard["name"]] if lost else []
        for number, entry in list(self.entries.items()):
            if entry.shard is not None:
                kept, lost = self._without(entry.shard, unwanted)
                if lost:
                    self._write_entry(number, BlockEntry(kept, entry.rejected, entry.counts))
                removed += lost
        if replaced:
            self._replace_manifest([shard for shard in shards if shard is not None], self.manifest["complete"])
            for name in replaced:
                (self.root / name).unlink(missing_ok=True)
        return removed

    def _without(self, shard: dict[str, Any], unwanted: set[str]) -> tuple[dict[str, Any] | None, int]:
        table = _read_shard(self.root, shard)
        kept = [key not in unwanted for key in table.column("key").to_pylist()]
        lost = len(kept) - sum(kept)
        if not lost:
            return shard, 0
        if lost == len(kept):
            return None, lost
        stem, _, revision = shard["name"].removesuffix(".arrow").partition(".")
        name = f"{stem}.{int(revision or 0) + 1}.arrow"
        return write_arrow(self.root / name, table.filter(pa.array(kept)).combine_chunks()), lost

    def close(self, rejected: Sequence[Rejected] = ()) -> None:
        """Fold the blocks into the manifest, write index and list of rejections, and mark the store complete.

        Args:
            rejected: what the source itself could not offer; beside the rejections of the blocks.
        """
        if self._pending:
            self._flush()
        self.list_rejections(rejected)
        if self.entries or not self.manifest["complete"]:
            self._replace_manifest(self._shards(), True)
        for number in list(self.entries):
            (self.root / BLOCKS / f"{number:05d}.json").unlink()
        self.entries = {}
        self._remove_orphans()

    def list_rejections(self, rejected: Sequence[Rejected] = ()) -> None:
        """Write the list of what was rejected, with the reasons; `rejected` as in `close`."""
        listed = {item.key: item for item in [*rejected, *self.rejected.values()]}
        lines = "".join(json.dumps(asdict(listed[key]), ensure_ascii=False) + "\n" for key in sorted(listed))
        if lines:
            write_atomically(self.root / REJECTED, lines.encode("utf-8", "replace"))
        else:
            (self.root / REJECTED).unlink(missing_ok=True)

    def counts(self) -> Counter[str]:
        """Counts of the blocks that `close` has not folded yet."""
        return sum((Counter(entry.counts) for entry in self.entries.values()), Counter())

    def forget_rejections(self, keys: Iterable[str]) -> None:
        """Rejections that are tried again."""
        for key in keys:
            self.rejected.pop(key, None)
        if (self.root / REJECTED).exists():
            self.list_rejections()
        for number, entry in list(self.entries.items()):
            kept = [item for item in entry.rejected if item["key"] in self.rejected]
            if len(kept) != len(entry.rejected):
                self._write_entry(number, BlockEntry(entry.shard, kept, entry.counts))

    def see_block(self, number: int) -> None:
        """See a block that another process has finished. Raises OSError: it is not in this process's file system."""
        path = self.root / BLOCKS / f"{number:05d}.json"
        self.entries[number] = BlockEntry(**json.loads(path.read_text(encoding="utf-8")))

    def refresh(self) -> None:
        """See the blocks that other processes have finished."""
        self.entries = self._read_entries()
        self.rejected |= self._read_rejected()

    def _replace_manifest(self, shards: list[dict[str, Any]], complete: bool) -> None:
        index = self.write_index(self.root, shards) if shards and complete else None
        self.manifest = {**self.manifest, "complete": complete, "shards": shards}
        self.manifest.pop("index", None)
        if index is not None:
            self.manifest["index"] = index
        write_manifest(self.root, self.manifest)

    @staticmethod
    def write_index(root: Path, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write the index of shards; returns its entry for the manifest."""
        tables = [index_of(_read_shard(root, shard)) for shard in shards]
        table = pa.concat_tables(tables).combine_chunks()
        content = to_arrow(table)
        # Under the hash of its content: the old manifest keeps its index until the new one is in place.
        name = f"index-{xxhash.xxh3_64_hexdigest(content)}.arrow"
        write_atomically(root / name, content)
        return _entry(name, len(table), content)

    def _remove_orphans(self) -> None:
        """Files that a killed process renamed into place but never listed, and indexes of former manifests."""
        named = {shard["name"] for shard in self.manifest["shards"]} | {self.manifest.get("index", {}).get("name")}
        for path in [*self.root.glob("shard-*.arrow"), *self.root.glob("index-*.arrow")]:
            if path.name not in named:
                path.unlink()

    def _read_entries(self) -> dict[int, BlockEntry]:
        folded = {shard["name"] for shard in self.manifest["shards"]}
        entries: dict[int, BlockEntry] = {}
        for path in sorted((self.root / BLOCKS).glob("*.json")):
            entry = BlockEntry(**json.loads(path.read_text(encoding="utf-8")))
            # Killed in `close` behind the manifest: the block is folded already.
            if entry.shard is None or entry.shard["name"] not in folded:
                entries[int(path.stem)] = entry
            else:
                path.unlink(missing_ok=True)
        return entries

    def _read_rejected(self) -> dict[str, Rejected]:
        listed = read_rejections(self.root / REJECTED)
        listed += [item for entry in self.entries.values() for item in entry.rejected]
        return {item["key"]: Rejected(**item) for item in listed}


def to_arrow(table: pa.Table) -> pa.Buffer:
    """A table as the bytes of an Arrow IPC stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def write_arrow(path: Path, table: pa.Table) -> dict[str, Any]:
    """Write rows as a shard; returns its entry for the manifest."""
    schema = schema_with_control() if CONTROL_SCHEMA.names[0] in table.column_names else SCHEMA
    content = to_arrow(table.select(schema.names).cast(schema))
    write_atomically(path, content)
    return _entry(path.name, len(table), content)


def _entry(name: str, rows: int, content: pa.Buffer) -> dict[str, Any]:
    return {"name": name, "rows": rows, "bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def _read_shard(root: Path, shard: Mapping[str, Any]) -> pa.Table:
    path = root / shard["name"]
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
