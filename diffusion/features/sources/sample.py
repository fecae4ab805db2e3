"""The one record type: a picture somewhere, its captions, and further columns; or the reason why it is none."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import xxhash
from PIL import Image

from diffusion.errors import DataError
from diffusion.images import decode_bytes, read_picture
from diffusion.text import clean_caption

MAX_TEXT_BYTES = 10_000_000  # of a text in an archive
# Columns of an index that are no attributes: the picture, its captions, their weights.
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions", "weights", "sharegpt4v")


class Picture(Protocol):
    """Where the bytes of a picture are."""

    @property
    def place(self) -> str:
        """What an error names."""

    def read(self) -> bytes:
        """All bytes of the file. Raises DataError naming the place."""

    def stat(self) -> str:
        """A cheap sign of the content, such as size and time; the same sign means the same bytes."""


@dataclass(frozen=True)
class PictureFile:
    """A picture that is a file of its own."""

    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        return read_picture(self.path)

    def stat(self) -> str:
        try:
            status = self.path.stat()
        except (OSError, ValueError):
            return "missing"
        return f"{status.st_size}:{status.st_mtime_ns}"


@dataclass(frozen=True)
class Sample:
    """A picture, its captions (cleaned, at least one) and further columns.

    Args:
        key: unique name in the source, with suffix, as a POSIX path normalised to Unicode NFC.
        weights: how often each caption is drawn, relative to the others; empty = all alike.
    """

    key: str
    picture: Picture
    captions: tuple[str, ...]
    attributes: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[float, ...] = ()

    def decode(self) -> Image.Image:
        """The picture, upright, RGB, sRGB. Raises DataError naming the place and the reason."""
        return decode_bytes(self.picture.read(), self.picture.place)

    def record_hash(self) -> str:
        """Changes when captions, weights or attributes change."""
        content = [self.captions, self.weights, sorted(self.attributes.items())]
        return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())


@dataclass(frozen=True)
class Columns:
    """Columns of an index that are read in place of the usual ones: of the picture, and of its captions.

    A caption cell is a text, or a list of texts of which one is drawn each time.
    """

    image: str | None = None
    caption: str | None = None

    @property
    def named(self) -> str:
        """The choices made, for messages."""
        return ", ".join(
            f"{kind} column {name!r}" for kind, name in (("image", self.image), ("caption", self.caption)) if name
        )

    def with_caption(self, row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
        """The row with the chosen captions alone. Raises DataError: no such column; the others are listed."""
        if self.caption is None:
            return row
        if self.caption not in row:
            raise DataError(f"{place}: no caption column {self.caption!r}; the columns are {', '.join(row)}")
        cell = row[self.caption]
        rest = {name: value for name, value in row.items() if name not in (*CAPTION_COLUMNS, self.caption)}
        return {**rest, "captions" if isinstance(cell, list) else "text": cell}


Maker = tuple[str, Callable[[], Sample]]  # the name of a row, and the function that makes its sample


@dataclass(frozen=True)
class Rejected:
    """What cannot become a sample: a name, the reason in one line, and the picture's `stat` when it was tried."""

    key: str
    reason: str
    stat: str = ""


@dataclass(frozen=True)
class Source:
    """Everything found in one place, in a fixed order.

    Args:
        kind: what it was taken for, for people.
    """

    place: str
    kind: str
    samples: list[Sample]
    rejected: list[Rejected]

    @property
    def total(self) -> int:
        return len(self.samples) + len(self.rejected)


def make_sample(
    place: str, key: str, picture: Picture, row: Mapping[str, Any], *, ignored: Sequence[str] = ()
) -> Sample:
    """A sample from an index row.

    Captions are `text`, `caption`, `prompt`, `sharegpt4v` (strings) and `captions` (a list of strings); `weights` is a
    list beside `captions`, one number each. Equal captions become one, their weights added. All other columns except
    `ignored` become attributes.

    Raises:
        DataError: naming `place`: captions or weights of a wrong type, or no caption at all.
    """
    single = [row[name] for name in ("text", "caption", "prompt", "sharegpt4v") if row.get(name) is not None]
    more = [] if row.get("captions") is None else row["captions"]
    if not isinstance(more, list) or not all(isinstance(text, str) for text in [*single, *more]):
        raise DataError(f"{place}: text must be a string and captions a list of strings")
    captions, weights = _weigh(place, single, more, row.get("weights"))
    if not captions:
        raise DataError(f"{place}: {key!r} has no caption; give it a text")
    attributes = {str(name): as_text(value) for name, value in row.items() if name not in (*CAPTION_COLUMNS, *ignored)}
    return Sample(key, picture, captions, attributes, weights)


def _weigh(place: str, single: list[str], more: list[str], given: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if given is not None:
        numbers = isinstance(given, list) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in given
        )
        if not numbers or len(given) != len(more) or not all(0 < value < float("inf") for value in given):
            raise DataError(f"{place}: weights must be one positive number for each of the {len(more)} captions")
    # A single text beside a weighted list is the list's first entry under another name, or one more with weight 1.
    weights = [1.0] * len(single) + [float(value) for value in given or [1.0] * len(more)]
    if given is not None:
        weights = [0.0 if text in more else 1.0 for text in single] + weights[len(single) :]
    total: dict[str, float] = {}
    for text, weight in zip([*single, *more], weights):
        if cleaned := clean_caption(text):
            total[cleaned] = total.get(cleaned, 0.0) + weight
    return tuple(total), (tuple(total.values()) if given is not None else ())


def as_text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_utf8(content: bytes, place: str) -> str:
    """Text of bytes; raises DataError, naming `place`, where they are none: a guess would train on wrong captions."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 (byte {error.start}); save it as UTF-8 text") from error


def normal_key(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def inside(root: Path, name: object, place: str) -> Path:
    """root / name for a name that an index gives.

    Raises:
        DataError: naming `place`: no string, absolute, with `..` or NUL, or a link out of the root.
    """
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{place}: the name of the picture is missing; it must be a path relative to {root}")
    parts = PurePosixPath(name.replace("\\", "/"))
    outside = "\0" in name or parts.is_absolute() or ".." in parts.parts or Path(name).is_absolute()
    try:
        if not outside and (root / name).resolve().is_relative_to(root.resolve()):
            return root / name
    except (OSError, RuntimeError, ValueError):  # a name too long for the disk, a loop of links
        pass
    raise DataError(f"{place}: {name[:200]!r} leaves {root}; keep pictures inside the folder")


def collect(place: str, kind: str, makers: Iterable[Maker], splits: Sequence[str] | None = None) -> Source:
    """Run one maker a row: its sample, or the DataError it raises as a rejection; a key that comes twice is one too.

    Args:
        makers: (name of the row, function that makes its sample).
        splits: keep samples whose attribute `split` is one of these; None = all.
    """
    samples: dict[str, Sample] = {}
    rejected: list[Rejected] = []
    for name, make in makers:
        try:
            sample = make()
        except DataError as error:
            rejected.append(Rejected(name, str(error)))
            continue
        if sample.key in samples:
            rejected.append(Rejected(name, f"{name}: picture {sample.key!r} is listed twice; remove one row"))
        else:
            samples[sample.key] = sample
    chosen = [s for s in samples.values() if splits is None or s.attributes.get("split") in splits]
    return Source(place, kind, chosen, rejected)


def refuse(reason: str) -> Callable[[], Sample]:
    """A maker for a row that is already known to be unusable."""

    def make() -> Sample:
        raise DataError(reason)

    return make
