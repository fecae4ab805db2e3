"""The original's JSON list: objects of `path`, `prompt`, mostly `height`, `width`, `ratio`, with Sigma a second caption
`sharegpt4v`; and where it looks for the pictures.
"""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
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

# Where the original's programs look for the pictures of a list, besides the root itself.
_PICTURE_FOLDERS = ("", "InternImgs", "InternalImgs", "images", "Images")


def read_json_list(path: Path) -> list[Any]:
    """The items of a JSON list.

    Raises:
        DataError: unreadable, not JSON (with the line), or no list.
    """
    try:
        content = json.loads(path.read_bytes().removeprefix(BOM_UTF8).decode("utf-8"))
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
