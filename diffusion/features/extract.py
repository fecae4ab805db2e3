"""From pictures and captions to a feature store: T5 once a caption, VAE once a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion.devices import choose_device
from diffusion.errors import ConfigError, DataError
from diffusion.features.fingerprint import hash_files, hash_folder, hash_names
from diffusion.features.rows import DTYPES, FeatureRow
from diffusion.features.sources import METADATA, Sample, read_folder
from diffusion.features.store import FeatureStoreWriter, write_atomically
from diffusion.images import (
    aspect_ratio_table,
    closest_bucket,
    decode_image,
    encode_moments,
    load_vae,
    resize_and_crop,
    to_tensor,
    vae_folder,
)
from diffusion.text import CLEANER_VERSION, CaptionEncoder, text_folders

SKIPPED = "skipped.jsonl"
MAX_SKIPPED_SHARE = 0.01


@dataclass(frozen=True)
class ExtractionSettings:
    """How pictures and captions become features.

    Args:
        image_size: px; the square side, or the bucket table's base with multi_scale.
        multi_scale: resize to the nearest aspect-ratio bucket instead of the square.
        dtype: storage dtype, and on a GPU the precision of the encoders.
        max_length: tokens a caption at most.
    """

    image_size: int = 256
    multi_scale: bool = False
    dtype: str = "bf16"
    max_length: int = 120
    batch_size: int = 32

    def bucket_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in px that a picture is resized and cropped to."""
        if not self.multi_scale:
            return self.image_size, self.image_size
        table = aspect_ratio_table(f"ASPECT_RATIO_{self.image_size}")
        return table[closest_bucket(height, width, table)]


@dataclass(frozen=True)
class _Decoded:
    sample: Sample
    image_size: tuple[int, int]
    bucket: tuple[int, int]
    crop_box: tuple[float, float, float, float]
    pixels: torch.Tensor


def extract_folder(
    source: str | Path,
    out: str | Path,
    pretrained: str | Path,
    settings: ExtractionSettings,
    *,
    device: str = "auto",
    limit: int | None = None,
    splits: Sequence[str] | None = None,
    rows_per_shard: int = 512,
) -> dict[str, int]:
    """Extract features of a folder of captioned pictures; call it again after an interruption.

    Args:
        source: see `read_folder`; out: the store's folder; pretrained: a diffusers pipeline folder.
        limit: evenly spaced subset of at most this many pictures.
    Returns:
        counts: pictures, skipped, captions_cut.
    Raises:
        DataError: broken source, other settings than the store's, or more than 1 % unreadable pictures.
        CheckpointError: encoders missing.
    """
    if settings.dtype not in DTYPES:
        raise ConfigError(f"--dtype {settings.dtype} is unknown; choose one of {', '.join(DTYPES)}")
    samples = read_folder(source, splits)
    if limit is not None and limit < len(samples):
        samples = [samples[i * len(samples) // limit] for i in range(limit)]
    chosen = choose_device(device)
    compute = DTYPES[settings.dtype] if chosen.type == "cuda" else torch.float32
    encoder = CaptionEncoder.from_pretrained(pretrained, device=chosen, dtype=compute, max_length=settings.max_length)
    vae = load_vae(pretrained, device=chosen, dtype=compute)
    writer = FeatureStoreWriter(
        out,
        _fingerprint(Path(source), Path(pretrained), settings, samples),
        encoder.encode_unpadded([""])[0],
        dtype=settings.dtype,
        rows_per_shard=rows_per_shard,
    )
    skipped = _Skipped(Path(out) / SKIPPED, len(samples))
    todo = samples[writer.num_rows + skipped.before(writer.num_rows) :]
    done = len(samples) - len(todo)
    with tqdm(total=len(samples), initial=done, unit="picture", file=sys.stdout, mininterval=1) as bar:
        for decoded in _batches(_decode(todo, settings, skipped, writer), settings.batch_size, rows_per_shard):
            for row in _encode(decoded, encoder, vae):
                writer.add(row)
            bar.update(len(decoded))
    writer.close()
    return {"pictures": writer.num_rows, "skipped": len(skipped.entries), "captions_cut": encoder.num_truncated}


def _fingerprint(
    source: Path, pretrained: Path, settings: ExtractionSettings, samples: Sequence[Sample]
) -> dict[str, Any]:
    tokenizer, text_encoder = text_folders(pretrained)
    metadata = source / METADATA
    return {
        "text_encoder": hash_folder(text_encoder),
        "tokenizer": hash_folder(tokenizer),
        "vae": hash_folder(vae_folder(pretrained)),
        "cleaner": CLEANER_VERSION,
        "image_size": settings.image_size,
        "multi_scale": settings.multi_scale,
        "dtype": settings.dtype,
        "max_length": settings.max_length,
        "source": hash_files([metadata] if metadata.is_file() else [s.path.with_suffix(".txt") for s in samples]),
        "pictures": len(samples),
        "selection": hash_names(f"{sample.key}\t{sample.path.stat().st_size}" for sample in samples),
    }


class _Skipped:
    """Unreadable pictures: counted, listed in skipped.jsonl, and beyond 1 % an error."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.allowed = path, int(total * MAX_SKIPPED_SHARE)
        self.entries: list[dict[str, Any]] = []
        if path.is_file():
            self.entries = [json.loads(line) for line in path.read_text().splitlines()]

    def before(self, num_rows: int) -> int:
        """How many pictures were skipped before row `num_rows` - 1; those behind it are forgotten and tried again."""
        self.entries = [entry for entry in self.entries if entry["after_rows"] < num_rows]
        self._write()
        return len(self.entries)

    def add(self, key: str, reason: str, after_rows: int) -> None:
        self.entries.append({"key": key, "reason": reason, "after_rows": after_rows})
        self._write()
        if len(self.entries) > self.allowed:
            raise DataError(
                f"{len(self.entries)} unreadable pictures exceed 1 % ({self.allowed} allowed), the last: {reason}; "
                f"all are listed in {self.path}"
            )

    def _write(self) -> None:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.entries)
        write_atomically(self.path, lines.encode())


def _decode(
    samples: Sequence[Sample], settings: ExtractionSettings, skipped: _Skipped, writer: FeatureStoreWriter
) -> Iterator[_Decoded]:
    """Decode ahead in threads (Pillow releases the interpreter), in order."""

    def load(sample: Sample) -> _Decoded | DataError:
        try:
            image = decode_image(sample.path)
        except DataError as error:
            return error
        bucket = settings.bucket_of(image.height, image.width)
        cropped, box = resize_and_crop(image, bucket)
        return _Decoded(sample, (image.height, image.width), bucket, box, to_tensor(cropped))

    ahead = 4 * settings.batch_size
    decoded_rows = writer.num_rows
    with ThreadPoolExecutor(max_workers=8) as pool:
        for start in range(0, len(samples), ahead):
            part = samples[start : start + ahead]
            for sample, result in zip(part, pool.map(load, part)):
                if isinstance(result, DataError):
                    skipped.add(sample.key, str(result), decoded_rows)
                else:
                    decoded_rows += 1
                    yield result


def _batches(decoded: Iterator[_Decoded], size: int, rows_per_shard: int) -> Iterator[list[_Decoded]]:
    """Consecutive pictures of one bucket, at most `size`, never across shards: a shard depends on its rows alone."""
    batch: list[_Decoded] = []
    for number, item in enumerate(decoded):
        full = len(batch) == size or number % rows_per_shard == 0
        if batch and (full or batch[0].bucket != item.bucket):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _encode(batch: Sequence[_Decoded], encoder: CaptionEncoder, vae: Any) -> Iterator[FeatureRow]:
    mean, std = encode_moments(vae, torch.stack([item.pixels for item in batch]))
    texts = [caption for item in batch for caption in item.sample.captions]
    embeds = iter(encoder.encode_unpadded(texts))
    for index, item in enumerate(batch):
        captions = list(item.sample.captions)
        yield FeatureRow(
            key=item.sample.key,
            image_size=item.image_size,
            bucket=item.bucket,
            crop_box=item.crop_box,
            latents_mean=mean[index].cpu(),
            latents_std=std[index].cpu(),
            captions=captions,
            caption_embeds=[next(embeds) for _ in captions],
            attributes=item.sample.attributes,
        )
