"""Which pictures are to be captioned, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from diffusion.errors import DataError
from diffusion.features.sources import PictureFile, Rejected, picture_roots, read_json_list
from diffusion.features.sources.folder import find_pictures, read_text
from diffusion.features.sources.sample import inside, normal_key
from diffusion.images import IMAGE_SUFFIXES
from diffusion.text import clean_caption


@dataclass(frozen=True)
class CaptionTask:
    """A picture that wants a caption.

    Args:
        key: path below the data root, with suffix; original: the caption it has, or "".
        size: (height, width) in px as the index says, or None.
    """

    key: str
    picture: PictureFile
    original: str
    size: tuple[int, int] | None = None

    @property
    def text_name(self) -> str:
        """Of the file of its caption, below the output folder."""
        return PurePosixPath(self.key).with_suffix(".txt").as_posix()


def read_caption_index(
    data_root: Path, index: Path | None, *, sidecars: bool = True
) -> tuple[list[CaptionTask], list[Rejected]]:
    """Pictures in the order of their index, and what is wrong with the rest.

    Args:
        index: JSON list of `path` and, optionally, `prompt`, `height`, `width`; or a text file of one path a line, with
            or without suffix; None = every picture below `data_root`. A name that is no path is looked for there too.
        sidecars: without an index, NAME.txt beside a picture is the caption it has.
    Raises:
        DataError: no such folder or index, an index that is no JSON, or not one usable picture.
    """
    if not data_root.is_dir():
        raise DataError(f"--data-root {data_root}: no such folder; give the folder of the pictures")
    rejected: list[Rejected] = []
    if index is None:
        makers = _of_folder(data_root, sidecars, rejected)
    else:
        path = index if index.is_file() else data_root / index
        if not path.is_file():
            raise DataError(f"--index {index}: no such file, nor {path}; give a JSON list or a text file of pictures")
        makers = _of_lines(path, data_root) if path.suffix.lower() == ".txt" else _of_list(path, data_root)
    tasks: dict[str, CaptionTask] = {}
    for place, make in makers:
        try:
            task = make()
            if (owner := tasks.get(task.text_name)) is not None:
                what = "is listed twice" if owner.key == task.key else f"and {owner.key!r} share one name"
                raise DataError(f"{place}: {task.key!r} {what}; both captions would be {task.text_name}")
        except DataError as error:
            rejected.append(Rejected(place, str(error)))
        else:
            tasks[task.text_name] = task
    if not tasks:
        first = f": {rejected[0].reason}" if rejected else ""
        raise DataError(f"{index or data_root}: not one picture to caption{first}")
    return list(tasks.values()), rejected


_Makers = Iterator[tuple[str, Callable[[], CaptionTask]]]


def _of_folder(root: Path, sidecars: bool, rejected: list[Rejected]) -> _Makers:
    pictures, clashes = find_pictures(root)
    for place, make in clashes:
        try:
            make()
        except DataError as error:
            rejected.append(Rejected(place, str(error)))
    for key, path in pictures.items():
        text = path.with_suffix(".txt")
        yield (
            key,
            lambda key=key, path=path, text=text: CaptionTask(  # type: ignore[misc]
                key, PictureFile(path), clean_caption(read_text(text)) if sidecars and text.is_file() else ""
            ),
        )


def _of_list(path: Path, root: Path) -> _Makers:
    roots = picture_roots(root)
    for number, item in enumerate(read_json_list(path)):
        place = f"{path} item {number}"
        yield place, lambda place=place, item=item: _listed(place, item, roots)  # type: ignore[misc]


def _listed(place: str, item: Any, roots: list[Path]) -> CaptionTask:
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, dict) or not isinstance(item.get("prompt") or "", str):
        raise DataError(f"{place}: an item is {{'path': 'a.jpg', 'prompt': 'a caption'}}")
    key, picture = _picture(place, item.get("path"), roots)
    size = item.get("height"), item.get("width")
    known = all(isinstance(side, int) and side > 0 for side in size)
    return CaptionTask(key, picture, clean_caption(item.get("prompt") or ""), size if known else None)  # type: ignore[arg-type]


def _of_lines(path: Path, root: Path) -> _Makers:
    roots = picture_roots(root)
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        place, name = f"{path} line {number}", line.strip()
        if name:
            yield place, lambda place=place, name=name: CaptionTask(*_picture(place, name, roots), "")  # type: ignore[misc]


def _picture(place: str, name: Any, roots: list[Path]) -> tuple[str, PictureFile]:
    """Key and file of a picture that an index names, with or without suffix."""
    for root in roots:
        found = inside(root, name, place)
        for suffix in ("", *IMAGE_SUFFIXES):
            path = Path(f"{found}{suffix}")
            try:
                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                    return normal_key(PurePosixPath(name + suffix).as_posix()), PictureFile(path)
            except OSError:  # a name too long for the disk
                continue
    raise DataError(f"{place}: picture {str(name)[:200]!r} does not exist; give its folder with --data-root")
