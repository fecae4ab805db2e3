"""Pictures with captions in a folder: an ImageFolder (metadata.jsonl or .csv), or `x.jpg` beside `x.txt`."""

from __future__ import annotations

import csv
import io
import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.features.sources.sample import (
    Columns,
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

METADATA = ("metadata.jsonl", "metadata.csv")
_ROW = "a row is {'file_name': 'a.png', 'text': 'a caption'}"


def read_folder(root: str | Path, splits: Sequence[str] | None = None) -> list[Sample]:
    """Samples of a folder in which nothing may be wrong, in a fixed order.

    Args:
        splits: keep rows whose `split` is one of these; None = all.
    Raises:
        DataError: no such folder, the first broken row (with its line), picture without caption or the reverse, or
            nothing left.
    """
    source = scan_folder(root, splits)
    if source.rejected:
        more = f" ({len(source.rejected) - 1} more such problems)" if len(source.rejected) > 1 else ""
        raise DataError(source.rejected[0].reason + more)
    if not source.samples:
        raise DataError(f"{root}: no pictures" + (f" in split {', '.join(splits)}" if splits else ""))
    return source.samples


def scan_folder(root: str | Path, splits: Sequence[str] | None = None, columns: Columns | None = None) -> Source:
    """Samples of a folder, and what is wrong with the rest.

    Args:
        columns: of the index; None = the usual ones.
    Raises:
        DataError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder of pictures with {METADATA[0]} or with .txt captions")
    pictures, clashes = find_pictures(root)
    index = next((root / name for name in METADATA if (root / name).is_file()), None)
    if index is None:
        return collect(str(root), "folder of pictures with .txt", [*clashes, *_sidecars(root, pictures)], splits)
    named: set[str] = set()
    makers = [*clashes, *_metadata(index, pictures, named, columns or Columns())]
    reason = f"{root}: picture {{!r}} has no caption: it is not listed in {index.name}; caption or remove it"
    unlisted = [(key, refuse(reason.format(key))) for key in sorted(pictures.keys() - named)]
    return collect(str(root), f"ImageFolder ({index.name})", [*makers, *unlisted], splits)


def find_pictures(root: Path) -> tuple[dict[str, Path], list[Maker]]:
    """Key -> path of all pictures below a folder, hidden ones left out; and those whose keys clash or are no text."""
    found: dict[str, Path] = {}
    clashes: list[Maker] = []
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        key = normal_key(path.relative_to(root).as_posix())
        if (shown := str(path).encode("utf-8", "replace").decode()) != str(path):
            clashes.append((shown, refuse(f"{shown}: the file name is not UTF-8; rename it")))
        elif key in found:
            reason = f"{found[key]} and {path} have the same name after Unicode normalisation; rename one"
            clashes.append((str(path), refuse(reason)))
        else:
            found[key] = path
    return found, clashes


def _metadata(index: Path, pictures: dict[str, Path], named: set[str], columns: Columns) -> Iterator[Maker]:
    """Makers of the rows; keys that a row names, usable or not, go into `named`."""
    rows = _csv_rows(index) if index.suffix == ".csv" else json_lines(index)
    for place, row in rows:
        if isinstance(row, str):
            yield place, refuse(row)
        else:
            named.add(normal_key(Path(row["file_name"]).as_posix()))
            yield place, lambda place=place, row=row: _listed(index.parent, place, row, pictures, columns)  # type: ignore[misc]


def _listed(root: Path, place: str, row: dict[str, Any], pictures: dict[str, Path], columns: Columns) -> Sample:
    inside(root, row["file_name"], f"{place}: file_name")
    key = normal_key(Path(row["file_name"]).as_posix())
    if key not in pictures:
        raise DataError(f"{place}: picture {row['file_name']!r} does not exist in {root}")
    chosen = columns.with_caption(row, place)
    return make_sample(place, key, PictureFile(pictures[key]), chosen, ignored=("file_name",))


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(place, row) of every line; the row is a string, the reason, when the line is no object with a file_name."""
    # Only a line feed ends a row: str.splitlines would also cut at U+2028, which may stand inside a caption.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield place, f"{place} is not JSON ({error})"
                continue
            good = isinstance(row, dict) and isinstance(row.get("file_name"), str)
            yield place, row if good else f"{place} has no file_name; {_ROW}"


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        text = as_utf8(path.read_bytes().removeprefix(BOM_UTF8), str(path))
    except DataError as error:
        yield str(path), str(error)
        return
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            place = f"{path} line {reader.line_num}"
            good = isinstance(row.get("file_name"), str) and None not in row and None not in row.values()
            yield place, row if good else f"{place} does not have a value for each column of the first line; {_ROW}"
    except csv.Error as error:
        yield f"{path} line {reader.line_num}", f"{path} line {reader.line_num} is not CSV ({error})"


def _sidecars(root: Path, pictures: dict[str, Path]) -> Iterator[Maker]:
    texts = {path.with_suffix("") for path in root.rglob("*.txt") if not path.name.startswith(".")}
    for key, path in pictures.items():
        texts.discard(path.with_suffix(""))
        yield str(path), lambda key=key, path=path: _beside(key, path, path.with_suffix(".txt"))  # type: ignore[misc]
    for orphan in sorted(texts):
        name = orphan.with_name(orphan.name + ".txt")
        yield (
            str(name),
            refuse(f"{name} is a caption without a picture; add the picture or remove the file"),
        )


def _beside(key: str, path: Path, caption: Path) -> Sample:
    if not caption.is_file():
        raise DataError(f"{path} has no caption; write {caption.name} beside it, or a {METADATA[0]}")
    return make_sample(str(caption), key, PictureFile(path), {"text": read_text(caption)})


def read_text(path: Path) -> str:
    """A text file of a person's: UTF-8 with or without byte-order mark.

    Raises:
        DataError: unreadable, or of another encoding.
    """
    try:
        return as_utf8(path.read_bytes().removeprefix(BOM_UTF8), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend or remove it") from error
