"""webdataset tars: members `NAME.jpg` with `NAME.txt` and, optionally, `NAME.json` beside it.

The tar is indexed once and its pictures are read in place, so any worker reaches any picture without unpacking.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.features.sources.sample import (
    MAX_TEXT_BYTES,
    Maker,
    Sample,
    Source,
    as_utf8,
    collect,
    inside,
    make_sample,
    normal_key,
    refuse,
)
from diffusion.images import IMAGE_SUFFIXES

_Member = tuple[int, int]  # offset and size


@dataclass(frozen=True)
class PictureInTar:
    """A picture that is a stretch of an uncompressed tar."""

    tar: Path
    name: str
    offset: int
    size: int

    @property
    def place(self) -> str:
        return f"{self.tar}!{self.name}"

    def read(self) -> bytes:
        return _stretch(self.tar, (self.offset, self.size), self.place)

    def stat(self) -> str:
        try:
            return f"{self.offset}:{self.size}:{self.tar.stat().st_mtime_ns}"
        except OSError:
            return "missing"


def scan_tars(paths: Sequence[Path], splits: Sequence[str] | None = None) -> Source:
    """Samples of webdataset shards, in the order of the members; keys are TAR NAME/MEMBER.

    Raises:
        DataError: a file that is no tar, or a compressed one.
    """
    makers = (maker for path in paths for maker in _tar(path))
    return collect(str(paths[0].parent if len(paths) > 1 else paths[0]), "webdataset", makers, splits)


def _tar(path: Path) -> Iterator[Maker]:
    groups: dict[str, dict[str, _Member]] = {}
    repeated: list[str] = []
    damage = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not Path(member.name).name.startswith("."):
                    # As webdataset: everything behind the first dot of the file name is the kind of the member.
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    entry = groups.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if suffix.lower() in entry:
                        repeated.append(f"{path}!{member.name}")
                    entry.setdefault(suffix.lower(), (member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if not groups:
            raise DataError(f"{path} is no uncompressed tar ({error}); unpack .tar.gz to .tar first") from error
        damage = f"{path} is damaged behind {len(groups)} samples ({error}); replace it"
    for stem, members in groups.items():
        place = f"{path}!{stem}"
        yield place, lambda place=place, stem=stem, members=members: _grouped(path, place, stem, members)  # type: ignore[misc]
    for place in repeated:
        yield place, refuse(f"{place}: a second member of this name; rename one")
    if damage:
        yield str(path), refuse(damage)


def _grouped(path: Path, place: str, stem: str, members: dict[str, _Member]) -> Sample:
    inside(path, stem, place)
    suffix = next((suffix for suffix in members if f".{suffix.rsplit('.', 1)[-1]}" in IMAGE_SUFFIXES), None)
    if suffix is None:
        raise DataError(f"{place} has no picture, only {', '.join(sorted(members))}; add one or remove it")
    row: dict[str, Any] = {}
    if "json" in members:
        try:
            content = json.loads(_stretch(path, members["json"], f"{place}.json"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}.json is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise DataError(f"{place}.json is no object of columns")
        row.update(content)
    if "txt" in members:
        row["text"] = as_utf8(_stretch(path, members["txt"], f"{place}.txt"), f"{place}.txt")
    name = f"{stem}.{suffix}"
    return make_sample(place, normal_key(f"{path.name}/{name}"), PictureInTar(path, name, *members[suffix]), row)


def _stretch(path: Path, member: _Member, place: str) -> bytes:
    offset, size = member
    if not place.endswith(IMAGE_SUFFIXES) and size > MAX_TEXT_BYTES:
        raise DataError(f"{place}: {size} bytes are no caption; at most {MAX_TEXT_BYTES}")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror}); replace {path}") from error
    if len(content) != size:
        raise DataError(f"{place}: the tar ends in the middle of it; replace {path}")
    return content
