"""The original's indexes: its JSON list, its SAM layout, and the folders of InternalData.

JSON list: objects of `path`, `prompt`, mostly `height`, `width`, `ratio`, with Sigma a 2nd caption `sharegpt4v`.
SAM layout: ROOT/partition/*.txt name pictures without extension; ROOT/images/NAME.jpg, ROOT/captions/NAME.txt. The
published SAM-LLaVA captions, unpacked into ROOT/captions, need no partition: every caption with a picture counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.features.sources.folder import find_pictures, read_text
from diffusion.features.sources.sample import (
    Maker,
    PictureFile,
    Sample,
    Source,
    collect,
    inside,
    make_sample,
    normal_key,
    refuse,
)
from diffusion.images import IMAGE_SUFFIXES

# Where the original's programs look for the pictures of a list, besides the root itself.
_PICTURE_FOLDERS = ("", "InternImgs", "InternalImgs", "images", "Images")


def read_json_list(path: Path) -> list[Any]:
    """The items of a JSON list.

    Raises:
        DataError: unreadable, not JSON (with the line), or no list.
    """
    try:
        content = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); mend or replace it") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON ({error.msg}); mend it") from error
    if not isinstance(content, list):
        raise DataError(f"{path} is not a list of objects with path, prompt, height and width")
    return content


def scan_json_lists(paths: Sequence[Path], root: Path, splits: Sequence[str] | None = None) -> Source:
    """Samples of the original's JSON lists; `path` is relative to `root`, or to its folder InternImgs.

    Raises:
        DataError: a list that is no JSON.
    """
    return collect(str(paths[0]), "JSON list of the original", _listed_items(paths, picture_roots(root)), splits)


def picture_roots(root: Path) -> list[Path]:
    """Folders in which the original looks for the pictures of a data set at `root`."""
    roots = [root / name for name in _PICTURE_FOLDERS]
    for old, new in (("InternData", "InternImgs"), ("InternalData", "InternalImgs"), ("InternalData", "InternImgs")):
        roots.append(Path(root.as_posix().replace(old, new)))
    return list(dict.fromkeys(folder for folder in roots if folder.is_dir()))


def _listed_items(paths: Sequence[Path], roots: list[Path]) -> Iterator[Maker]:
    for path in paths:
        for number, item in enumerate(read_json_list(path)):
            place = f"{path} item {number}"
            if not isinstance(item, dict):
                yield place, refuse(f"{place} is no object; an item is {{'path': 'a.jpg', 'prompt': 'a caption'}}")
            else:
                yield place, lambda place=place, item=item: _item(place, item, roots)  # type: ignore[misc]


def _item(place: str, item: dict[str, Any], roots: list[Path]) -> Sample:
    if not roots:
        raise DataError(f"{place}: the folder of the pictures does not exist; give it with --dataset_root")
    candidates = [inside(root, item.get("path"), f"{place}: path") for root in roots]
    found = next((path for path in candidates if os.path.isfile(path)), None)  # False for impossible names
    if found is None:
        raise DataError(f"{place}: picture {candidates[0]} does not exist; give its folder with --dataset_root")
    # A caption that is missing or empty leaves the other one.
    row = {name: value for name, value in item.items() if name not in ("prompt", "sharegpt4v") or value}
    return make_sample(place, normal_key(Path(item["path"]).as_posix()), PictureFile(found), row, ignored=("path",))


def scan_sam(root: Path, partitions: Sequence[Path] = (), splits: Sequence[str] | None = None) -> Source:
    """Samples of a SAM layout; without partition files, every caption and every picture is expected to be paired.

    Raises:
        DataError: no folder of captions.
    """
    images = next((root / name for name in ("images", "Images") if (root / name).is_dir()), root)
    captions = root / "captions"
    if not captions.is_dir():
        raise DataError(f"{captions} does not exist; the SAM layout has captions/NAME.txt and images/NAME.jpg")
    pictures, clashes = find_pictures(images)
    by_stem: dict[str, str] = {}
    for key in pictures:
        stem = key.rsplit(".", 1)[0]
        if stem in by_stem:
            reason = f"{images}: {by_stem[stem]!r} and {key!r} share one name without suffix; rename one"
            clashes.append((key, refuse(reason)))
        by_stem.setdefault(stem, key)
    texts = {
        normal_key(path.relative_to(captions).with_suffix("").as_posix()): path for path in captions.rglob("*.txt")
    }
    names = _partition_names(partitions) if partitions else [(str(texts.get(n, n)), n) for n in sorted(by_stem | texts)]
    makers = (
        (place, lambda place=place, name=name: _named(place, name, images, pictures, by_stem, texts))  # type: ignore[misc]
        for place, name in names
    )
    return collect(str(root), "SAM layout", [*clashes, *makers], splits)


def _partition_names(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                yield f"{path} line {number}", normal_key(line.strip())


def _named(
    place: str, name: str, images: Path, pictures: dict[str, Path], by_stem: dict[str, str], texts: dict[str, Path]
) -> Sample:
    inside(images, name, place)
    key = by_stem.get(name, name if name in pictures else None)
    if key is None:
        raise DataError(f"{place}: picture {images / name}{IMAGE_SUFFIXES[1]} does not exist")
    caption = texts.get(name, texts.get(key.rsplit(".", 1)[0]))
    if caption is None:
        raise DataError(f"{place}: {pictures[key]} has no caption; write captions/{name}.txt")
    return make_sample(str(caption), key, PictureFile(pictures[key]), {"text": read_text(caption)})
