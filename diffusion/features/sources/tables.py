"""Tables with a picture column: parquet files, a folder saved by Hugging Face `datasets`, or a hub data set.

`datasets` maps the table from disk, so any worker reaches any row. Pictures stay encoded until they are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from diffusion.errors import DataError
from diffusion.features.sources.sample import CAPTION_COLUMNS, Maker, Sample, Source, collect, make_sample, normal_key
from diffusion.images import read_picture

HUB = "hub:"


@dataclass(frozen=True)
class PictureInTable:
    """A picture in a row of a mapped table: its bytes, or the path of a file."""

    table: Any
    column: str
    row: int
    name: str

    @property
    def place(self) -> str:
        return f"{self.name} row {self.row}"

    def read(self) -> bytes:
        cell = self.table[self.row][self.column]
        content = cell if isinstance(cell, bytes) else (cell or {}).get("bytes")
        if content is not None:
            return content
        if not isinstance(cell, dict) or not cell.get("path"):
            raise DataError(f"{self.place}: column {self.column!r} is empty; remove the row")
        return read_picture(cell["path"])

    def stat(self) -> str:
        try:
            return xxhash.xxh3_64_hexdigest(self.read())
        except DataError:
            return "missing"


def scan_table(place: str, splits: Sequence[str] | None = None, files: Sequence[Path] = ()) -> Source:
    """Samples of `hub:OWNER/NAME`, of parquet `files`, of a folder of them, or of a saved `datasets` folder.

    The picture column is the one of type Image, or the first of bytes; captions as in `make_sample`.

    Raises:
        DataError: nothing there, unreadable, or no column of pictures or captions.
    """
    parts = list(_load(place, splits, files))
    makers = (
        maker
        for split, table in parts
        for maker in (_rows(f"{place}/{split}", table, f"{split}/") if len(parts) > 1 else _rows(place, table, ""))
    )
    return collect(
        place, "hub data set" if place.startswith(HUB) else "table", makers, None if place.startswith(HUB) else splits
    )


def _load(place: str, splits: Sequence[str] | None, files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if place.startswith(HUB):
            loaded = datasets.load_dataset(place.removeprefix(HUB))
        elif found := [str(path) for path in files or sorted(Path(place).glob("*.parquet"))]:
            loaded = datasets.load_dataset("parquet", data_files={"train": found})
        else:
            loaded = datasets.load_from_disk(place)
    except Exception as error:  # offline, missing, damaged: the library raises many unrelated classes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{place} cannot be opened as a data set ({reason[:300]}); check the name or the files"
        ) from error
    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    if splits is not None and place.startswith(HUB):
        missing = [name for name in splits if name not in parts]
        if missing:
            raise DataError(f"{place} has no split {missing[0]!r}; it has {', '.join(parts)}")
        parts = {name: parts[name] for name in splits}
    yield from parts.items()


def _rows(name: str, table: Any, prefix: str) -> Iterator[Maker]:
    import datasets

    features = table.features
    column = next((c for c, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is not None:
        table = table.cast_column(column, datasets.Image(decode=False))
    else:
        column = next(
            (c for c, kind in features.items() if getattr(kind, "dtype", "") in ("binary", "large_binary")), None
        )
    if column is None:
        column = next((c for c in ("image", "jpg", "png", "webp") if c in features), None)
    if column is None or not set(CAPTION_COLUMNS) & set(features):
        raise DataError(
            f"{name} has columns {', '.join(features)}; a picture column and one of {', '.join(CAPTION_COLUMNS)} are "
            "needed"
        )
    rows = table.remove_columns([column])
    for number in range(len(table)):
        place = f"{name} row {number}"
        picture = PictureInTable(table, column, number, name)
        key = normal_key(f"{prefix}{number:09d}")

        def make(place: str = place, key: str = key, picture: Any = picture, number: int = number) -> Sample:
            return make_sample(place, key, picture, rows[number])

        yield place, make
