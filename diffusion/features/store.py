"""The feature store: Arrow shards, a manifest, an index, and T5("").

    DIR/manifest.json            format, fingerprint, dtype, shards with rows, bytes and hash
    DIR/shard-00000.arrow ...    Arrow IPC streams; Hugging Face `datasets.Dataset.from_file` opens them too
    DIR/index.arrow              key, sizes, attributes of all rows, so that opening touches no shard
    DIR/null_caption.safetensors T5("") with its own length
    DIR/rejected.jsonl           what could not be extracted, with the reason

Reading maps the files; a random sample costs a fraction of a millisecond.
"""

from __future__ import annotations

import bisect
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion.errors import DataError
from diffusion.features.access import StoreFiles
from diffusion.features.manifest import MANIFEST, NULL_CAPTION, REMEDY, read_manifest
from diffusion.features.rows import CONTROL_SCHEMA, DTYPES, INDEX_SCHEMA, FeatureRow, from_buffer, index_of, upgrade

_TENSOR_COLUMNS = ("latents_mean", "latents_std", "caption_embeds", *CONTROL_SCHEMA.names)


class FeatureStore:
    """Random access to a store; picklable, so that data-loading workers map the files themselves.

    Args:
        root: the store's folder, or an fsspec URL, whose files are then copied to a cache as they are needed.
        verify: also hash every shard (seconds a GB).
    Raises:
        DataError: no store there, an extraction that was not finished, or a shard that is missing, truncated or
            (with verify) damaged.
    """

    def __init__(self, root: str | Path, *, verify: bool = False) -> None:
        self.files = StoreFiles(root)
        self.manifest = read_manifest(self.files.small(MANIFEST), self.files)
        if self.manifest["dtype"] not in DTYPES:
            raise DataError(f"{root}: dtype {self.manifest['dtype']!r} of the manifest is unknown; {REMEDY}")
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.caption_channels: int = self.manifest["caption_channels"]
        shards = self.manifest["shards"]
        if self.files.url is None or verify:  # remote shards are checked when they arrive
            for shard in shards:
                self.files.checked(shard, verify=verify)
        self._ends = list(accumulate(shard["rows"] for shard in shards))
        self._tables: dict[int, pa.Table] = {}
        self._index: pa.Table | None = None
        self.null_caption = self._read_null_caption()
        if not self.manifest["complete"]:
            raise DataError(
                f"{root} holds an extraction that was interrupted; run the same tools/extract_features.py command "
                "again to finish it, or to read what it could not use"
            )
        if not self._ends:
            raise DataError(f"{root} holds no features yet; {REMEDY}")

    @property
    def root(self) -> str:
        """The folder or URL, for messages."""
        return str(self.files)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Encoders and settings that made the features."""
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_index": None}

    def row(self, index: int) -> FeatureRow:
        """Everything about a sample."""
        table, position = self._locate(index)
        row = table.slice(position, 1).select([name for name in table.column_names if name not in _TENSOR_COLUMNS])
        values = upgrade(row).to_pylist()[0]
        mean, std = self.latents(index)
        control_mean, control_std = self.control(index) or (None, None)
        return FeatureRow(
            key=values["key"],
            image_size=tuple(values["image_size"]),
            bucket=tuple(values["bucket"]),
            crop_box=tuple(values["crop_box"]),
            latents_mean=mean,
            latents_std=std,
            captions=values["captions"],
            caption_embeds=[self.caption(index, number) for number in range(len(values["captions"]))],
            attributes={pair["name"]: pair["value"] for pair in values["attributes"]},
            **{name: values[name] for name in ("caption_weights", "source_stat", "source_hash", "record_hash")},
            control_mean=control_mean,
            control_std=control_std,
        )

    def latents(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a sample's latents, (C, h, w) each."""
        return self._moments(index, "latents")

    def control(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the condition's latents, (C, h, w) each; None: the store has no condition."""
        return self._moments(index, "control") if "condition" in self.fingerprint else None

    def _moments(self, index: int, prefix: str) -> tuple[Tensor, Tensor]:
        table, position = self._locate(index)
        shape = table.column("latent_shape")[position].as_py()
        mean, std = (table.column(f"{prefix}_{name}")[position].as_buffer() for name in ("mean", "std"))
        return from_buffer(mean, self.dtype, shape), from_buffer(std, self.dtype, shape)

    def caption(self, index: int, number: int) -> Tensor:
        """Embedding of one caption of a sample, (L, C), without padding."""
        table, position = self._locate(index)
        buffer = table.column("caption_embeds")[position].values[number].as_buffer()
        return from_buffer(buffer, self.dtype, (-1, self.caption_channels))

    def caption_text(self, index: int, number: int) -> str:
        """Text of one caption of a sample."""
        table, position = self._locate(index)
        return table.column("captions")[position].values[number].as_py()

    def caption_choice(self, index: int) -> tuple[int, list[float]]:
        """Captions of a sample, and how often each is drawn relative to the others; no weights = all alike."""
        table, position = self._locate(index)
        weighted = "caption_weights" in table.column_names
        weights = table.column("caption_weights")[position].as_py() if weighted else []
        return len(table.column("captions")[position]), weights

    def identity(self, index: int) -> tuple[str, tuple[int, int]]:
        """Key, and (height, width) in px of the original picture, of a sample."""
        table, position = self._locate(index)
        height, width = table.column("image_size")[position].as_py()
        return table.column("key")[position].as_py(), (height, width)

    def column(self, name: str) -> list[Any]:
        """A column of all rows: key, image_size, bucket, captions, ..."""
        if name in INDEX_SCHEMA.names:
            return self.index.column(name).to_pylist()
        return [value for number in range(len(self._ends)) for value in self.table(number).column(name).to_pylist()]

    def attribute(self, name: str) -> list[str]:
        """One attribute of every sample.

        Raises:
            DataError: a sample lacks it; lists those there are.
        """
        pairs = self.index.column("attributes").combine_chunks()
        rows, flat = pc.list_parent_indices(pairs), pc.list_flatten(pairs)
        names, values = pc.struct_field(flat, "name"), pc.struct_field(flat, "value")
        chosen = pc.equal(names, name)
        if not np.array_equal(rows.filter(chosen).to_numpy(zero_copy_only=False), np.arange(len(self))):
            known = ", ".join(sorted(pc.unique(names).to_pylist()))
            raise DataError(f"{self.root} has no attribute {name!r}; it has {known or 'none'}")
        return values.filter(chosen).to_pylist()

    def sizes(self, name: str) -> np.ndarray:
        """(N, 2) int32, height and width in px of every sample: `image_size` or `bucket`."""
        column = self.index.column(name).combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)

    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) in px of every sample's bucket."""
        # One tuple a bucket, shared by its samples: a million rows are a million pointers, not a million tuples.
        # A pair of int32 is one int64 to the hash table; sorting pairs took a second for a million.
        pairs = pa.array(self.sizes("bucket").view(np.int64).reshape(-1)).dictionary_encode()
        different = pairs.dictionary.to_numpy().view(np.int32).reshape(-1, 2)
        shared = [(height, width) for height, width in different.tolist()]
        return [shared[i] for i in pairs.indices.to_numpy().tolist()]

    @property
    def index(self) -> pa.Table:
        """Index columns of all rows: key, image_size, bucket, attributes, num_captions.

        Raises:
            DataError: damaged, or not of this store's rows.
        """
        if self._index is None:
            entry = self.manifest.get("index")
            if entry is None:
                self._index = pa.concat_tables([index_of(self.table(number)) for number in range(len(self._ends))])
            else:
                self._index = self._map(self.files.checked(entry))
            if len(self._index) != len(self) or self._index.schema != INDEX_SCHEMA:
                raise DataError(f"{self.root}: the index has {len(self._index)} rows instead of {len(self)}; {REMEDY}")
        return self._index

    @property
    def num_shards(self) -> int:
        return len(self._ends)

    def table(self, number: int) -> pa.Table:
        """The rows of a shard, mapped from disk; columns in `rows.SCHEMA`."""
        if number not in self._tables:
            shard = self.manifest["shards"][number]
            table = self._map(self.files.checked(shard))
            if len(table) != shard["rows"]:
                raise DataError(f"{self.root}/{shard['name']} has {len(table)} rows, not {shard['rows']}; {REMEDY}")
            self._tables[number] = table
        return self._tables[number]

    def _locate(self, index: int) -> tuple[pa.Table, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self.table(number), index - (self._ends[number - 1] if number else 0)

    def _map(self, path: Path) -> pa.Table:
        try:
            with pa.memory_map(str(path)) as source:
                return pa.ipc.open_stream(source).read_all().combine_chunks()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error

    def _read_null_caption(self) -> Tensor:
        path = self.files.small(NULL_CAPTION)
        try:
            return load_file(path)["null_caption"]
        except (OSError, KeyError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
