"""The stages of extraction: read and decode (threads) -> T5 and VAE (one device) -> rows of a block.

Stages know nothing of stores or ranks; a block of samples goes in, its rows and rejections come out. What comes out
depends on the block alone, so a block that is made again is equal to the byte.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from diffusion.devices import HostCopy
from diffusion.errors import ConfigError, DataError
from diffusion.features.conditions import DEFAULT_HED, DETECTORS, Detector, read_condition
from diffusion.features.rows import FeatureRow
from diffusion.features.sources import Rejected, Sample
from diffusion.images import (
    BucketTable,
    Measure,
    aspect_ratio_table,
    closest_bucket,
    decode_bytes,
    encode_moments,
    resize_and_crop,
    to_unit_range,
    with_transposes,
)
from diffusion.text import CaptionEncoder

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_NO_PIXELS = np.empty(0, np.uint8)


@dataclass(frozen=True)
class ExtractionSettings:
    """How pictures and captions become features.

    Args:
        image_size: px; the square side, or the bucket table's base with multi_scale.
        multi_scale: resize to the nearest aspect-ratio bucket instead of the square.
        dtype: storage dtype, and on a GPU the precision of the encoders.
        max_length: tokens a caption at most.
        batch_size: pictures a VAE call.
        token_budget: tokens a T5 call.
        small: what happens to pictures smaller than their bucket: enlarged and counted, or rejected.
        bucket_measure: how the nearest bucket is found, see `closest_bucket`.
        bucket_table: name of the bucket table; None = the one of `image_size`.
        transposes: add the sizes that the table holds on their side alone, see `with_transposes`.
        condition: of a ControlNet, encoded beside the picture: "canny", "hed", or a folder of pictures named and sized
            as the source's; None = none.
        hed_path: weights of the HED edge network.
        int8_text: keep T5 in 8 bits, for cards that cannot hold it in 16.
        compile_vae: compile the VAE, see `compile_encoder`; the same features but for rounding.
    Raises:
        ConfigError: no bucket table of that name or size, or a choice of buckets without multi_scale.
    """

    image_size: int = 256
    multi_scale: bool = False
    dtype: str = "bf16"
    max_length: int = 120
    batch_size: int = 32
    token_budget: int = 16384
    small: Literal["enlarge", "reject"] = "enlarge"
    bucket_measure: Measure = "difference"
    bucket_table: str | None = None
    transposes: bool = False
    condition: str | None = None
    hed_path: Path = DEFAULT_HED
    int8_text: bool = False
    compile_vae: bool = False

    def __post_init__(self) -> None:
        if self.multi_scale:
            _ = self.table
        elif self.bucket_fingerprint():
            names = ", ".join(f"--{name.replace('_', '-')}" for name in self.bucket_fingerprint())
            raise ConfigError(f"{names} chooses among aspect-ratio buckets; add --multi-scale")

    @cached_property
    def table(self) -> BucketTable:
        """The buckets of `multi_scale`."""
        table = aspect_ratio_table(self.bucket_table or f"ASPECT_RATIO_{self.image_size}")
        return with_transposes(table) if self.transposes else table

    def bucket_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in px that a picture is resized and cropped to."""
        if not self.multi_scale:
            return self.image_size, self.image_size
        return self.table[closest_bucket(height, width, self.table, self.bucket_measure)]

    def bucket_fingerprint(self) -> dict[str, Any]:
        """What differs from the original's choice; nothing by default, so that older stores keep their fingerprint."""
        usual = {"bucket_measure": "difference", "bucket_table": None, "transposes": False}
        return {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}

    @property
    def condition_folder(self) -> Path | None:
        """Where the condition pictures are, when they are not computed."""
        return None if self.condition in (None, *DETECTORS) else Path(str(self.condition))


@dataclass(frozen=True)
class Block:
    """Consecutive samples that become one shard, and the shard's number."""

    number: int
    samples: Sequence[Sample]


@dataclass
class EncodedBlock:
    """Rows in the order of the block's samples, what was rejected, and counts for the report."""

    number: int
    rows: list[FeatureRow] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """A picture as the VAE takes it, and where it comes from; fields as in `FeatureRow`."""

    image_size: tuple[int, int]
    bucket: tuple[int, int]
    crop_box: tuple[float, float, float, float]
    pixels: np.ndarray  # (H, W, 3) uint8
    stat: str
    content_hash: str
    condition: np.ndarray | None = None  # (H, W, 3) uint8, of a folder of condition pictures

    @property
    def enlarged(self) -> bool:
        left, top, right, bottom = self.crop_box
        return bottom - top < self.bucket[0] - 0.5 or right - left < self.bucket[1] - 0.5


def decode_sample(sample: Sample, settings: ExtractionSettings) -> Decoded | Rejected:
    """Bytes -> upright sRGB -> bucket -> cover and centre crop; a reason when the picture cannot be used."""
    stat = sample.picture.stat()
    try:
        data = sample.picture.read()
        image = decode_bytes(data, sample.picture.place)
        bucket = settings.bucket_of(image.height, image.width)
        cropped, box = resize_and_crop(image, bucket)
        condition = read_condition(settings.condition_folder, sample.key, image.size)
    except (DataError, MemoryError) as error:
        return Rejected(sample.key, str(error) or f"{sample.picture.place}: out of memory", stat)
    size = (image.height, image.width)
    pixels = None if condition is None else np.asarray(resize_and_crop(condition, bucket)[0])
    decoded = Decoded(size, bucket, box, np.asarray(cropped), stat, xxhash.xxh3_128_hexdigest(data), pixels)
    if settings.small == "reject" and decoded.enlarged:
        reason = f"{sample.picture.place}: {size[1]}x{size[0]} px is smaller than its bucket {bucket[1]}x{bucket[0]}"
        return Rejected(sample.key, f"{reason}; --small enlarge takes it", stat)
    return decoded


def encode_blocks(
    blocks: Iterable[Block],
    settings: ExtractionSettings,
    encoder: CaptionEncoder | None,
    vae: Any | None,
    detector: Detector | None = None,
) -> Iterator[EncodedBlock]:
    """Encode blocks one after the other, while threads decode the pictures of the next ones.

    Args:
        encoder: None leaves the captions out; vae: None leaves the pictures out, which are then not read.
        detector: makes condition pictures of the pictures, see `load_detector`.
    """
    blocks = list(blocks)
    samples = [sample for block in blocks for sample in block.samples]
    # Pillow releases the interpreter while it decodes and resizes.
    with ThreadPoolExecutor(max_workers=max(4, min(32, os.cpu_count() or 4))) as pool:
        decode = partial(decode_sample, settings=settings)
        decoded = ahead(pool, samples, decode, max(16, 4 * settings.batch_size)) if vae is not None else iter(())
        for block in blocks:
            yield encode_block(block, settings, encoder, vae, decoded, detector)


def ahead(
    pool: ThreadPoolExecutor, items: Iterable[_Item], function: Callable[[_Item], _Result], depth: int
) -> Iterator[_Result]:
    """`function` of all items in order, by threads that are at most `depth` items ahead of the consumer."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def encode_block(
    block: Block,
    settings: ExtractionSettings,
    encoder: CaptionEncoder | None,
    vae: Any | None,
    decoded: Iterator[Decoded | Rejected],
    detector: Detector | None = None,
) -> EncodedBlock:
    """Rows of a block from its decoded pictures, of which as many are taken as the block has samples.

    Args:
        encoder, vae, detector: as in `encode_blocks`.
    """
    result = EncodedBlock(block.number)
    samples = block.samples
    moments: dict[int, tuple[Tensor, ...]] = {}
    found: dict[int, Decoded] = {}
    if vae is not None:
        # A generator is drawn from one block at a time: the block's own pictures.
        for index, item in _batched(zip(range(len(samples)), decoded), settings.batch_size, vae, detector, moments):
            if isinstance(item, Rejected):
                result.rejected.append(item)
            else:
                found[index] = replace(
                    item, pixels=_NO_PIXELS, condition=None
                )  # encoded or waiting in a batch: free it here
        kept = [index for index in range(len(samples)) if index in found]
    else:
        kept = list(range(len(samples)))
    embeds: Iterator[Tensor] = iter(())
    if encoder is not None:
        before = encoder.num_truncated
        texts = [caption for index in kept for caption in samples[index].captions]
        embeds = iter(encoder.encode_unpadded(texts, token_budget=settings.token_budget))
        result.counts["captions_cut"] = encoder.num_truncated - before
    for index in kept:
        captions = [next(embeds) for _ in samples[index].captions] if encoder is not None else []
        result.rows.append(_row(samples[index], found.get(index), moments.get(index), captions))
    result.counts["enlarged"] = sum(item.enlarged for item in found.values())
    return result


def _batched(
    items: Iterable[tuple[int, Decoded | Rejected]],
    size: int,
    vae: Any,
    detector: Detector | None,
    moments: dict[int, tuple[Tensor, ...]],
) -> Iterator[tuple[int, Decoded | Rejected]]:
    """Pass items on; fill `moments` (mean, std, and the condition's) of the decoded ones, in batches of one bucket."""
    pending: dict[tuple[int, int], list[tuple[int, Decoded]]] = {}

    underway: list[tuple[list[int], HostCopy]] = []

    def to_device(levels: list[np.ndarray]) -> Tensor:
        shape = (len(levels), *levels[0].shape)  # (B, H, W, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=vae.device.type == "cuda")
        np.stack(levels, out=pixels.numpy())
        return to_unit_range(pixels.to(vae.device, non_blocking=True))

    def arrive() -> None:
        while underway:
            indices, copy = underway.pop()
            values = copy.wait()
            moments.update({index: tuple(part[row] for part in values) for row, index in enumerate(indices)})

    def flush(bucket: tuple[int, int]) -> None:
        batch = pending.pop(bucket)
        pixels = to_device([item.pixels for _, item in batch])
        found = [*encode_moments(vae, pixels)]
        given = [item.condition for _, item in batch if item.condition is not None]
        if given or detector is not None:
            found += encode_moments(vae, to_device(given) if detector is None else detector(pixels))
        arrive()  # of the batch before, while the device computes this one
        underway.append(([index for index, _ in batch], HostCopy(*found)))

    for index, item in items:
        if isinstance(item, Decoded):
            pending.setdefault(item.bucket, []).append((index, item))
            if len(pending[item.bucket]) == size:
                flush(item.bucket)
            elif sum(map(len, pending.values())) >= 4 * size:
                # Many buckets at once: bounded memory matters more than a full batch.
                flush(max(pending, key=lambda bucket: (len(pending[bucket]), bucket)))
        yield index, item
    for bucket in sorted(pending):
        flush(bucket)
    arrive()


def _row(
    sample: Sample, decoded: Decoded | None, moments: tuple[Tensor, ...] | None, captions: list[Tensor]
) -> FeatureRow:
    nothing = torch.empty(0)
    mean, std, *control = moments if moments is not None else (nothing, nothing)
    return FeatureRow(
        key=sample.key,
        image_size=decoded.image_size if decoded else (0, 0),
        bucket=decoded.bucket if decoded else (0, 0),
        crop_box=decoded.crop_box if decoded else (0, 0, 0, 0),
        latents_mean=mean,
        latents_std=std,
        captions=list(sample.captions),
        caption_embeds=captions,
        attributes=dict(sample.attributes),
        caption_weights=list(sample.weights),
        source_stat=decoded.stat if decoded else "",
        source_hash=decoded.content_hash if decoded else "",
        record_hash=sample.record_hash(),
        control_mean=control[0] if control else None,
        control_std=control[1] if control else None,
    )
