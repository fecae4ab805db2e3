"""The original's SAM layout: ROOT/images/NAME.jpg with ROOT/captions/NAME.txt; ROOT/partition/*.txt, if there are any,
name the pictures without suffix.

The captions may also lie in an archive, as their publisher packs them (SA1B_caption.tar.gz of SAM-LLaVA-Captions10M):
text files by the name of their picture, in whatever folder. Those of pictures that are not here are passed over.
"""

from __future__ import annotations

import logging
import tarfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from diffusion.errors import DataError
from diffusion.features.sources.folder import find_pictures, read_text
from diffusion.features.sources.sample import (
    MAX_TEXT_BYTES,
    Maker,
    PictureFile,
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

_logger = logging.getLogger(__name__)
_ARCHIVES = (".tar.gz", ".tgz")


def is_sam(root: Path) -> bool:
    """Whether a folder has this layout."""
    return _images(root) is not None and ((root / "captions").is_dir() or bool(_archives(root)))


def _images(root: Path) -> Path | None:
    return next((root / name for name in ("images", "Images") if (root / name).is_dir()), None)


def _archives(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.endswith(_ARCHIVES))


def scan_sam(root: Path, partitions: Sequence[Path] = (), splits: Sequence[str] | None = None) -> Source:
    """Samples of a SAM layout; without partition files, all pictures, and all text files of `captions`, have a partner.

    Raises:
        DataError: no captions, or an archive that is none.
    """
    images, captions = _images(root) or root, root / "captions"
    archives = [*_archives(root), *_archives(captions)]
    if not captions.is_dir() and not archives:
        raise DataError(
            f"{captions} does not exist; the SAM layout has images/NAME.jpg, and captions/NAME.txt or an archive of "
            f"them (*{', *'.join(_ARCHIVES)})"
        )
    pictures, wrong = find_pictures(images)
    by_stem: dict[str, str] = {}
    for key in pictures:
        stem = key.rsplit(".", 1)[0]
        if stem in by_stem:
            reason = f"{images}: {by_stem[stem]!r} and {key!r} share one name without suffix; rename one"
            wrong.append((key, refuse(reason)))
        by_stem.setdefault(stem, key)
    texts: dict[str, Path | _Packed] = {
        normal_key(path.relative_to(captions).with_suffix("").as_posix()): path for path in captions.rglob("*.txt")
    }
    for archive in archives:
        packed = _Archive(archive, [stem for stem in by_stem if stem not in texts])
        texts |= packed.texts
        wrong += packed.wrong
    names = (
        _partition_names(partitions) if partitions else [(_place(texts.get(n, n)), n) for n in sorted(by_stem | texts)]
    )
    makers = (
        (place, lambda place=place, name=name: _named(place, name, images, pictures, by_stem, texts))  # type: ignore[misc]
        for place, name in names
    )
    return collect(str(root), "SAM layout", [*wrong, *makers], splits)


@dataclass(frozen=True)
class _Packed:
    """A caption that was read from an archive."""

    place: str
    content: bytes


@dataclass
class _Archive:
    """The captions of an archive whose file name is that of a wanted picture; all others are counted and forgotten."""

    path: Path
    wanted: Iterable[str]
    texts: dict[str, Path | _Packed] = field(default_factory=dict)
    wrong: list[Maker] = field(default_factory=list)

    def __post_init__(self) -> None:
        stems: dict[str, list[str]] = {}
        for stem in self.wanted:
            stems.setdefault(stem.rsplit("/", 1)[-1], []).append(stem)
        count = 0
        _logger.info("%s: reading its captions; ten million take some minutes", self.path)
        try:
            for member, content in _members(self.path):
                count += 1
                self._take(member, content, stems.get(normal_key(PurePosixPath(member).stem), []))
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            if not count:
                raise DataError(f"{self.path} is no archive of captions ({error}); replace or remove it") from error
            reason = f"{self.path} is damaged behind {count} captions ({error}); replace it"
            self.wrong.append((str(self.path), refuse(reason)))
        _logger.info("%s: %d captions, %d of them of pictures that are here", self.path, count, len(self.texts))

    def _take(self, member: str, content: bytes | None, stems: list[str]) -> None:
        place = f"{self.path}!{member}"
        if stems and content is None:
            self.wrong.append((place, refuse(f"{place}: no caption has more than {MAX_TEXT_BYTES} bytes")))
        elif len(stems) > 1:
            self.wrong.append((place, refuse(f"{place}: {stems[0]!r} and {stems[1]!r} have this name; rename one")))
        elif stems and stems[0] in self.texts:
            self.wrong.append((place, refuse(f"{place}: a second caption of {stems[0]!r}; remove one")))
        elif stems and content is not None:
            self.texts[stems[0]] = _Packed(place, content.removeprefix(BOM_UTF8))


def _members(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of the text files, in one pass; None = too much for a caption."""
    with tarfile.open(path, "r:gz") as tar:
        while (member := tar.next()) is not None:
            if member.isreg() and member.name.endswith(".txt"):
                file = tar.extractfile(member) if member.size <= MAX_TEXT_BYTES else None
                yield member.name, None if file is None else file.read()
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep the headers of all


def _place(text: Path | _Packed | str) -> str:
    return text.place if isinstance(text, _Packed) else str(text)


def _partition_names(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                yield f"{path} line {number}", normal_key(line.strip())


def _named(
    place: str,
    name: str,
    images: Path,
    pictures: dict[str, Path],
    by_stem: dict[str, str],
    texts: dict[str, Path | _Packed],
) -> Sample:
    inside(images, name, place)
    key = by_stem.get(name, name if name in pictures else None)
    if key is None:
        raise DataError(f"{place}: picture {images / name}{IMAGE_SUFFIXES[1]} does not exist")
    caption = texts.get(name, texts.get(key.rsplit(".", 1)[0]))
    if caption is None:
        raise DataError(f"{place}: {pictures[key]} has no caption; write captions/{name}.txt")
    text = as_utf8(caption.content, caption.place) if isinstance(caption, _Packed) else read_text(caption)
    return make_sample(_place(caption), key, PictureFile(pictures[key]), {"text": text})
