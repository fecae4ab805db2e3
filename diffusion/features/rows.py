"""One sample of precomputed features, and its form in an Arrow table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
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
    ]
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

    def check(self, dtype: torch.dtype) -> None:
        """Refuse what must never enter a store of that dtype.

        Raises:
            DataError: NaN or infinity in the features, or captions without embeddings.
        """
        tensors = [("latents_mean", self.latents_mean), ("latents_std", self.latents_std)]
        tensors += [(f"caption_embeds[{i}]", embeds) for i, embeds in enumerate(self.caption_embeds)]
        for name, tensor in tensors:
            if not torch.isfinite(tensor.to(dtype)).all():
                raise DataError(
                    f"{self.key}: {name} is not finite in {dtype}; the encoder overflowed: use --dtype fp32"
                )
        if not self.captions or len(self.captions) != len(self.caption_embeds):
            raise DataError(f"{self.key}: {len(self.captions)} captions and {len(self.caption_embeds)} embeddings")


def to_bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Little-endian bytes of a tensor in a storage dtype."""
    return tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()


def from_buffer(buffer: pa.Buffer, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor of its own memory from a stored buffer."""
    # bytearray: a writable copy of a few kilobytes, so that no page of the mapped file escapes into a batch.
    return torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(*shape)


def to_batch(rows: Sequence[FeatureRow], dtype: torch.dtype) -> pa.RecordBatch:
    """Rows as one record batch."""
    columns = {
        "key": [row.key for row in rows],
        "image_size": [list(row.image_size) for row in rows],
        "bucket": [list(row.bucket) for row in rows],
        "crop_box": [list(row.crop_box) for row in rows],
        "latent_shape": [list(row.latents_mean.shape) for row in rows],
        "latents_mean": [to_bytes(row.latents_mean, dtype) for row in rows],
        "latents_std": [to_bytes(row.latents_std, dtype) for row in rows],
        "captions": [row.captions for row in rows],
        "caption_embeds": [[to_bytes(embeds, dtype) for embeds in row.caption_embeds] for row in rows],
        "attributes": [
            [{"name": name, "value": value} for name, value in sorted(row.attributes.items())] for row in rows
        ],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
