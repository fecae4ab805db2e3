"""Tables with a picture column: parquet files, a folder saved by Hugging Face `datasets`, or a hub data set.

`datasets` maps the table from disk, so any worker reaches any row. Pictures stay encoded until they are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from diffusion.checkpoints.hub import endpoint, not_at_hand, why_unreachable
from diffusion.errors import DataError
from diffusion.features.sources.sample import (
    CAPTION_COLUMNS,
    Columns,
    Maker,
    Sample,
    Source,
    collect,
    make_sample,
    normal_key,
)
from diffusion.images import read_picture

HUB = "hub:"


@dataclass(frozen=True)
class PictureInTable:
    """A picture in a row of a mapped table: its bytes, or the path of a file, which `datasets` writes absolute."""

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


def scan_table(
    place: str,
    splits: Sequence[str] | None = None,
    files: Sequence[Path] = (),
    *,
    columns: Columns | None = None,
) -> Source:
    """Samples of `hub:OWNER/NAME` (with `@CONFIG` if need be), of parquet `files` or a folder of them, or of a
    saved `datasets` folder.

    The picture column is the one of type Image, or the first of bytes; captions as in `make_sample`; unless `columns`
    names them.

    Raises:
        DataError: nothing there, unreadable, or no column of pictures or captions.
    """
    parts, chosen = list(_load(place, splits, files)), columns or Columns()
    makers = (
        maker
        for split, table in parts
        for maker in (
            _rows(f"{place}/{split}", table, f"{split}/", chosen) if len(parts) > 1 else _rows(place, table, "", chosen)
        )
    )
    return collect(
        place, "hub data set" if place.startswith(HUB) else "table", makers, None if place.startswith(HUB) else splits
    )


def _load(place: str, splits: Sequence[str] | None, files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if place.startswith(HUB):
            loaded = _from_hub(place.removeprefix(HUB))
        elif found := [str(path) for path in files or sorted(Path(place).glob("*.parquet"))]:
            loaded = datasets.load_dataset("parquet", data_files={"train": found})
        else:
            loaded = datasets.load_from_disk(place)
    except DataError:
        raise
    except Exception as error:  # missing, damaged: the library raises many unrelated classes
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


def _from_hub(place: str) -> Any:
    """A data set of the hub, `OWNER/NAME[@CONFIG]`; from the cache alone while the hub does not answer.

    Raises:
        DataError: no such data set, or no network and no cached copy.
    """
    import datasets

    name, _, config = place.partition("@")
    if not name.strip():
        raise DataError(f"{HUB} needs a name, as {HUB}OWNER/NAME")
    offline = datasets.config.HF_HUB_OFFLINE
    reason = "HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set" if offline else why_unreachable()
    # Told that there is no network, the library looks into its cache at once; it would ask for half a minute before.
    datasets.config.HF_HUB_OFFLINE = reason is not None
    try:
        return datasets.load_dataset(name, config or None)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{name} is no file or folder here and no data set that {endpoint()} shows you; check the name, or "
            "`hf auth login` if it is private or gated"
        ) from error
    except ConnectionError as error:
        if reason is None:
            raise
        cache = datasets.config.HF_DATASETS_CACHE
        raise DataError(not_at_hand(name, "this data set", reason, cache=cache, kind="datasets/")) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _rows(name: str, table: Any, prefix: str, columns: Columns) -> Iterator[Maker]:
    import datasets

    features = table.features
    for kind, wanted in (("image", columns.image), ("caption", columns.caption)):
        if wanted is not None and wanted not in features:
            raise DataError(f"{name} has no {kind} column {wanted!r}; the columns are {', '.join(features)}")
    pictures = [c for c, kind in features.items() if isinstance(kind, datasets.Image)]
    column = columns.image or next(iter(pictures), None)
    if column in pictures:
        table = table.cast_column(column, datasets.Image(decode=False))
    elif column is None:
        column = next(
            (c for c, kind in features.items() if getattr(kind, "dtype", "") in ("binary", "large_binary")), None
        )
    if column is None:
        column = next((c for c in ("image", "jpg", "png", "webp") if c in features), None)
    if column is None or not {*CAPTION_COLUMNS, columns.caption} & set(features):
        raise DataError(
            f"{name} has columns {', '.join(features)}; a picture column and one of {', '.join(CAPTION_COLUMNS)} are "
            "needed"
        )
    rows = table.remove_columns(list({column, *pictures}))
    for number in range(len(table)):
        place = f"{name} row {number}"
        picture = PictureInTable(table, column, number, name)
        key = normal_key(f"{prefix}{number:09d}")

        def make(place: str = place, key: str = key, picture: Any = picture, number: int = number) -> Sample:
            return make_sample(place, key, picture, columns.with_caption(rows[number], place))

        yield place, make
