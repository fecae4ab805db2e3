"""One sample of precomputed features, and its form in an Arrow table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffusion.errors import DataError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_size", pa.list_(pa.int32(), 2)),
        ("bucket", pa.list_(pa.int32(), 2)),
        ("crop_box", pa.list_(pa.float32(), 4)),
        ("latent_shape", pa.list_(pa.int32(), 3)),
        ("latents_mean", pa.large_binary()),
        ("latents_std", pa.large_binary()),
        ("captions", pa.list_(pa.string())),
        ("caption_embeds", pa.list_(pa.large_binary())),
        # Not map_: Hugging Face datasets cannot open it.
        ("attributes", pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))),
        # Since format version 2:
        ("caption_weights", pa.list_(pa.float32())),
        ("source_stat", pa.string()),
        ("source_hash", pa.string()),
        ("record_hash", pa.string()),
    ]
)
# Only in stores with a condition for ControlNets; readers that do not know them pass over them.
CONTROL_SCHEMA = pa.schema([("control_mean", pa.large_binary()), ("control_std", pa.large_binary())])
_SINCE_VERSION_2 = ("caption_weights", "source_stat", "source_hash", "record_hash")
# What opening a store reads of every row.
INDEX_SCHEMA = pa.schema(
    [SCHEMA.field(name) for name in ("key", "image_size", "bucket", "attributes")] + [("num_captions", pa.int32())]
)


@dataclass
class FeatureRow:
    """Features of one picture and all its captions.

    Args:
        key: the picture's path relative to its source.
        image_size: (height, width) of the original, px.
        bucket: (height, width) it was resized and cropped to, px.
        crop_box: (left, top, right, bottom) of the region shown, in px of the original.
        latents_mean, latents_std: (C, h, w) of the VAE's posterior, unscaled.
        captions, caption_embeds: texts, and one (L_i, caption_channels) tensor each, without padding.
        attributes: further columns of the source (concept, split, ...).
        caption_weights: how often each caption is drawn, relative to the others; empty = all alike.
        source_stat, source_hash, record_hash: size and time of the picture's file, xxh3-128 of its bytes, and a hash of
            captions, weights and attributes; empty in stores of format version 1.
        control_mean, control_std: (C, h, w) of the condition's posterior, unscaled; None in stores without condition.
    """

    key: str
    image_size: tuple[int, int]
    bucket: tuple[int, int]
    crop_box: tuple[float, float, float, float]
    latents_mean: Tensor
    latents_std: Tensor
    captions: list[str]
    caption_embeds: list[Tensor]
    attributes: dict[str, str] = field(default_factory=dict)
    caption_weights: list[float] = field(default_factory=list)
    source_stat: str = ""
    source_hash: str = ""
    record_hash: str = ""
    control_mean: Tensor | None = None
    control_std: Tensor | None = None

    def check(self, dtype: torch.dtype) -> None:
        """Refuse what must never enter a store of that dtype.

        Raises:
            DataError: NaN or infinity in the features, or captions without embeddings.
        """
        self.check_finite(dtype)
        if not self.captions or len(self.captions) != len(self.caption_embeds):
            raise DataError(f"{self.key}: {len(self.captions)} captions and {len(self.caption_embeds)} embeddings")
        if self.caption_weights and len(self.caption_weights) != len(self.captions):
            raise DataError(f"{self.key}: {len(self.caption_weights)} weights for {len(self.captions)} captions")

    def check_finite(self, dtype: torch.dtype) -> None:
        """Raises DataError naming the first feature with NaN or infinity in that dtype."""
        tensors = [("latents_mean", self.latents_mean), ("latents_std", self.latents_std)]
        tensors += [(f"caption_embeds[{i}]", embeds) for i, embeds in enumerate(self.caption_embeds)]
        if self.control_mean is not None and self.control_std is not None:
            tensors += [("control_mean", self.control_mean), ("control_std", self.control_std)]
        for name, tensor in tensors:
            if not torch.isfinite(tensor.to(dtype)).all():
                raise DataError(
                    f"{self.key}: {name} is not finite in {dtype}; the encoder overflowed: use --dtype fp32"
                )


def binaries(tensors: Sequence[Tensor], dtype: torch.dtype) -> pa.Array:
    """A large_binary array of the little-endian bytes of tensors in a storage dtype; the bytes are copied once."""
    parts = [tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors]
    offsets = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
    data = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    return pa.Array.from_buffers(
        pa.large_binary(), len(parts), [None, pa.py_buffer(offsets), pa.py_buffer(data)], null_count=0
    )


def from_buffer(buffer: pa.Buffer, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor of its own memory from a stored buffer."""
    # bytearray: a writable copy of a few kilobytes, so that no page of the mapped file escapes into a batch.
    return torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(*shape)


def to_batch(rows: Sequence[FeatureRow], dtype: torch.dtype) -> pa.RecordBatch:
    """Rows as one record batch."""
    columns: dict[str, Any] = {
        "key": [row.key for row in rows],
        "image_size": [list(row.image_size) for row in rows],
        "bucket": [list(row.bucket) for row in rows],
        "crop_box": [list(row.crop_box) for row in rows],
        "latent_shape": [list(row.latents_mean.shape) for row in rows],
        "latents_mean": binaries([row.latents_mean for row in rows], dtype),
        "latents_std": binaries([row.latents_std for row in rows], dtype),
        "captions": [row.captions for row in rows],
        "caption_embeds": pa.ListArray.from_arrays(
            pa.array(np.cumsum([0, *(len(row.caption_embeds) for row in rows)], dtype=np.int32)),
            binaries([embeds for row in rows for embeds in row.caption_embeds], dtype),
        ),
        "attributes": [
            [{"name": name, "value": value} for name, value in sorted(row.attributes.items())] for row in rows
        ],
        "caption_weights": [row.caption_weights for row in rows],
        "source_stat": [row.source_stat for row in rows],
        "source_hash": [row.source_hash for row in rows],
        "record_hash": [row.record_hash for row in rows],
    }
    schema = SCHEMA
    if any(row.control_mean is not None for row in rows):
        schema = schema_with_control()
        for name in CONTROL_SCHEMA.names:
            columns[name] = binaries([getattr(row, name) for row in rows], dtype)
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def schema_with_control() -> pa.Schema:
    """Of the shards of a store with a condition."""
    return pa.schema([*SCHEMA, *CONTROL_SCHEMA])


def upgrade(table: pa.Table) -> pa.Table:
    """A table of format version 1 with the columns that version 2 added, empty."""
    for name in (name for name in _SINCE_VERSION_2 if name not in table.column_names):
        empty: list[object] = [[] if name == "caption_weights" else ""] * len(table)
        table = table.append_column(SCHEMA.field(name), pa.array(empty, SCHEMA.field(name).type))
    return table


def index_of(table: pa.Table) -> pa.Table:
    """The index columns of a table of rows."""
    counts = pc.list_value_length(table.column("captions")).cast(pa.int32())
    columns = [table.column(name) for name in INDEX_SCHEMA.names[:-1]]
    return pa.table([*columns, counts], schema=INDEX_SCHEMA)
