"""What a person should know of their data before the hours of extraction: counts, sizes, captions, trouble, cost."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion.devices import choose_device
from diffusion.errors import CheckpointError, DataError
from diffusion.features.concepts import content_words
from diffusion.features.cost import encoding_seconds, feature_bytes, measured_seconds
from diffusion.features.extract import Encoders
from diffusion.features.sources import Rejected, Sample, Source
from diffusion.features.stages import ExtractionSettings
from diffusion.images import decode_bytes, labelled_grid, picture_size, resize_and_crop
from diffusion.text import MAX_CAPTION_CHARS, CaptionEncoder

_SHEET_PICTURES = 24
_SHEET_SIDE_PX = 160
_MEASURED = 16


@dataclass
class Report:
    """Figures of a source; `lines` is the form for people.

    Args:
        checked: pictures whose header was read; decoded: of these, how many were decoded to the last pixel.
        sizes: least, median and largest shorter side in px.
        small: pictures smaller than their bucket.
        tokens: of all checked captions, uncut; cut_captions, cut_tokens: beyond the limit. None = no tokenizer.
        bytes_estimated: of the feature store; seconds_*: for all pictures on this machine; "encoding" by arithmetic,
            "extracting" by trial. None = not known.
        unknown: why tokens, bytes and the time of encoding are not known.
    """

    place: str
    kind: str
    pictures: int
    rejected: list[Rejected]
    checked: int = 0
    decoded: int = 0
    sizes: tuple[int, int, int] = (0, 0, 0)
    small: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    duplicate_captions: int = 0
    long_captions: int = 0
    tokens: int | None = None
    cut_captions: int | None = None
    cut_tokens: int | None = None
    words_per_caption: float = 0.0
    different_words: int = 0
    same_stems: int = 0
    bytes_estimated: int | None = None
    seconds_decoding: float | None = None
    seconds_encoding: float | None = None
    unknown: str | None = None
    seconds_extracting: float | None = None

    def to_json(self) -> str:
        values = {**self.__dict__, "rejected": [item.__dict__ for item in self.rejected]}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def lines(self) -> Iterator[str]:
        """For people, most important first; every rejection with its reason at the end."""
        yield f"{self.place}: {self.kind}, {self.pictures} pictures with captions, {len(self.rejected)} unusable"
        yield f"looked at    {self.checked} headers, {self.decoded} pictures decoded completely"
        if self.checked:
            yield "shorter side {} px at least, {} median, {} at most".format(*self.sizes)
            enlarged = f"; {self.small} are smaller and would be enlarged" if self.small else ""
            yield f"buckets      {len(self.buckets)}{enlarged}"
            for name, count in sorted(self.buckets.items(), key=lambda item: -item[1])[:8]:
                yield f"             {name:>10} px  {count}"
        share = f"{self.captions / max(1, self.pictures):.1f} a picture"
        yield f"captions     {self.captions} ({share}), {self.duplicate_captions} of them repeat another picture's"
        if self.long_captions:
            yield f"             {self.long_captions} reach {MAX_CAPTION_CHARS} characters, where captions are cut"
        if self.tokens is not None:
            lost = 100 * (self.cut_tokens or 0) / max(1, self.tokens)
            yield f"tokens       {self.cut_captions} captions are too long; {lost:.1f} % of all tokens are cut"
        words = f"{self.words_per_caption:.1f} different content words a caption, {self.different_words} in all"
        yield f"concepts     {words}"
        if self.same_stems:
            yield (
                f"names        {self.same_stems} pictures share a file name without folder and suffix: fine in a "
                "store, refused by the original's layout"
            )
        if self.bytes_estimated is not None:
            yield f"disk         about {_size(self.bytes_estimated)} of features"
        if self.seconds_decoding is not None:
            yield f"time         about {_duration(self.seconds_decoding)} to read and decode, {os.cpu_count()} cores"
        if self.seconds_encoding is not None:
            yield f"             about {_duration(self.seconds_encoding)} to encode on this device, by arithmetic"
        if self.seconds_extracting is not None:
            yield f"             about {_duration(self.seconds_extracting)} to extract on this device, by trial"
        if self.unknown is not None:
            yield f"not known    tokens, disk and time of encoding: {self.unknown}"
        for item in self.rejected:
            yield f"unusable     {item.reason}"


def check_source(
    source: Source,
    settings: ExtractionSettings,
    pretrained: str | Path,
    *,
    headers: int = 20_000,
    decode: int = 512,
    measure: bool = False,
    device: str = "auto",
) -> Report:
    """Look at a source.

    Args:
        headers, decode: evenly spaced pictures whose header is read, and that are decoded completely.
        pretrained: its tokenizer counts tokens, its configs give the size of the features; may be missing.
        measure: time the encoders on a few pictures too (they must be loaded: seconds to minutes).
    """
    report = Report(source.place, source.kind, len(source.samples), list(source.rejected))
    _check_names(report, source.samples)
    _check_pictures(report, source.samples, settings, headers, decode)
    _check_captions(report, source.samples)
    try:
        encoders = Encoders.find(pretrained)
        mean_length = _check_tokens(report, _spaced(source.samples, headers), encoders, settings)
        _estimate(report, encoders, settings, mean_length, choose_device(device))
        if measure:
            few = _spaced(source.samples, _MEASURED)
            report.seconds_extracting = measured_seconds(
                few, len(source.samples), encoders, settings, choose_device(device)
            )
    except (CheckpointError, DataError) as error:
        report.unknown = str(error)  # no encoders here yet: what does not need them is reported all the same
    return report


def contact_sheet(samples: Sequence[Sample], settings: ExtractionSettings) -> Any:
    """Evenly spaced pictures as training would see them (cropped), with their first captions. None if none decodes."""
    pictures, labels = [], []
    for sample in _spaced(samples, _SHEET_PICTURES):
        try:
            image = sample.decode()
        except DataError:
            continue
        height, width = settings.bucket_of(image.height, image.width)
        scale = _SHEET_SIDE_PX / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pictures.append(resize_and_crop(image, size)[0])
        labels.append(sample.captions[0])
    return labelled_grid(pictures, labels, columns=6) if pictures else None


def _spaced(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    if len(samples) <= count:
        return samples
    return [samples[i * len(samples) // count] for i in range(count)]


def _check_names(report: Report, samples: Sequence[Sample]) -> None:
    stems = Counter(sample.key.rsplit("/", 1)[-1].rsplit(".", 1)[0] for sample in samples)
    report.same_stems = sum(count for count in stems.values() if count > 1)


def _check_pictures(
    report: Report, samples: Sequence[Sample], settings: ExtractionSettings, headers: int, decode: int
) -> None:
    chosen = _spaced(samples, headers)
    whole = {sample.key for sample in _spaced(chosen, decode)}

    def look(sample: Sample) -> tuple[int, int] | Rejected:
        try:
            data = sample.picture.read()
            if sample.key in whole:
                image = decode_bytes(data, sample.picture.place)
                return image.height, image.width
            return picture_size(data, sample.picture.place)
        except DataError as error:
            return Rejected(sample.key, str(error))

    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=max(4, min(32, os.cpu_count() or 4))) as pool:
        found = list(pool.map(look, chosen))
    elapsed = time.perf_counter() - started
    sizes = [item for item in found if not isinstance(item, Rejected)]
    report.rejected += [item for item in found if isinstance(item, Rejected)]
    report.checked, report.decoded = len(chosen), len(whole)
    if len(whole) == len(chosen):
        report.seconds_decoding = elapsed * len(samples) / max(1, len(chosen))
    if not sizes:
        return
    shorter = sorted(min(size) for size in sizes)
    report.sizes = shorter[0], shorter[len(shorter) // 2], shorter[-1]
    buckets = [settings.bucket_of(*size) for size in sizes]
    report.small = sum(h < bh or w < bw for (h, w), (bh, bw) in zip(sizes, buckets))
    report.buckets = dict(Counter(f"{width}x{height}" for height, width in buckets))


def _check_captions(report: Report, samples: Sequence[Sample]) -> None:
    owners: dict[str, str] = {}
    words: set[str] = set()
    total = 0
    for sample in samples:
        for caption in sample.captions:
            report.captions += 1
            report.duplicate_captions += owners.setdefault(caption, sample.key) != sample.key
            report.long_captions += len(caption) >= MAX_CAPTION_CHARS
            found = content_words(caption)
            total += len(found)
            words |= found
    report.words_per_caption = total / max(1, report.captions)
    report.different_words = len(words)


def _check_tokens(report: Report, samples: Sequence[Sample], encoders: Encoders, settings: ExtractionSettings) -> float:
    """Count tokens; returns the mean number that is kept a caption."""
    count = CaptionEncoder.token_counter(encoders.text)
    lengths = count([caption for sample in samples for caption in sample.captions])
    cut = [length - settings.max_length for length in lengths if length > settings.max_length]
    report.tokens, report.cut_captions, report.cut_tokens = sum(lengths), len(cut), sum(cut)
    return (report.tokens - report.cut_tokens) / max(1, len(lengths))


def _mean_area(buckets: dict[str, int]) -> float:
    """px of a picture in training."""
    areas = [math.prod(map(int, name.split("x"))) * count for name, count in buckets.items()]
    return sum(areas) / max(1, sum(buckets.values()))


def _estimate(
    report: Report, encoders: Encoders, settings: ExtractionSettings, mean_length: float, device: torch.device
) -> None:
    load: Any = {"pictures": report.pictures, "captions": report.captions, "tokens": mean_length}
    load["area"] = _mean_area(report.buckets)
    report.bytes_estimated = feature_bytes(encoders, settings, **load)
    report.seconds_encoding = encoding_seconds(encoders, settings, device, **load)


def _size(num_bytes: int) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= length:
            return f"{num_bytes / length:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
