"""From what a person types to a `Source`."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion.checkpoints.hub import no_such_path
from diffusion.errors import DataError
from diffusion.features.sources.folder import METADATA, scan_folder
from diffusion.features.sources.original import scan_json_lists
from diffusion.features.sources.sam import is_sam, scan_sam
from diffusion.features.sources.sample import Columns, Source
from diffusion.features.sources.tables import HUB, scan_table
from diffusion.features.sources.tars import scan_tars

_KNOWN = (
    "a folder of x.jpg + x.txt, an ImageFolder (metadata.jsonl or .csv), a SAM layout, a JSON list, parquet files, "
    "webdataset tars (patterns with * too), or hub:OWNER/NAME"
)


def open_source(
    place: str | Path,
    splits: Sequence[str] | None = None,
    *,
    dataset_root: str | Path | None = None,
    columns: Columns | None = None,
) -> Source:
    """Everything that `place` names, in a fixed order; what is wrong is listed in `rejected` and raises nothing.

    Args:
        place: see `_KNOWN`; a partition file of the SAM layout (`ROOT/partition/part0.txt`) works too.
        splits: of an index column `split` or of a hub data set; None = all.
        dataset_root: folder that the paths of a JSON list are relative to; None = the list's own folder, or the one
            above `partition/`.
        columns: of an ImageFolder or a table, those that are read; None = the usual ones.
    Raises:
        DataError: nothing there, in no known layout, or without a single usable sample.
    """
    text = str(place)
    if text.startswith(HUB):
        source = scan_table(text, splits, columns=columns)
    else:
        paths = [Path(name) for name in sorted(glob.glob(text))] if glob.has_magic(text) else [Path(text)]
        paths = [Path(text)] if Path(text).exists() else paths
        if not paths or not paths[0].exists():
            raise DataError(f"{no_such_path(text)}; give {_KNOWN}")
        is_folder = len(paths) == 1 and paths[0].is_dir()
        if is_folder:
            source = _folder(paths[0], splits, columns)
        else:
            source = _files(paths, splits, dataset_root, columns)
        if columns is not None and columns.named and not source.kind.startswith(("ImageFolder", "table")):
            raise DataError(f"{text} is a {source.kind} without columns; leave out {columns.named}")
    if not source.samples:
        where = f" in split {', '.join(splits)}" if splits else ""
        first = f"; {len(source.rejected)} rejected, the first: {source.rejected[0].reason}" if source.rejected else ""
        raise DataError(f"{text}: no pictures with captions{where}{first}")
    return source


def _folder(root: Path, splits: Sequence[str] | None, columns: Columns | None) -> Source:
    if any((root / name).is_file() for name in METADATA):
        return scan_folder(root, splits, columns)
    lists = [path for name in ("partition", "partition_filter") for path in sorted((root / name).glob("*.json"))]
    if lists:
        return scan_json_lists(lists, root, splits)
    if is_sam(root):
        return scan_sam(root, sorted((root / "partition").glob("*.txt")), splits)
    tars = sorted(root.glob("*.tar"))
    if tars:
        return scan_tars(tars, splits)
    if list(root.glob("*.parquet")) or (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file():
        return scan_table(str(root), splits, columns=columns)
    if list((root / "data").glob("*.parquet")):  # a data set as `hf download` leaves it
        return scan_table(str(root / "data"), splits, columns=columns)
    # A folder of the original's data set: its index beside the pictures.
    if (root / "data_info.json").is_file():
        return scan_json_lists([root / "data_info.json"], root, splits)
    return scan_folder(root, splits)


def _files(
    paths: Sequence[Path], splits: Sequence[str] | None, dataset_root: str | Path | None, columns: Columns | None
) -> Source:
    above = paths[0].parent.parent if paths[0].parent.name in ("partition", "partition_filter") else paths[0].parent
    readers: dict[str, Callable[[], Source]] = {
        ".json": lambda: scan_json_lists(paths, Path(dataset_root) if dataset_root is not None else above, splits),
        ".txt": lambda: scan_sam(above, paths, splits),
        ".tar": lambda: scan_tars(paths, splits),
        ".parquet": lambda: scan_table(str(paths[0]), splits, paths, columns=columns),
        ".jsonl": lambda: scan_folder(paths[0].parent, splits, columns),
        ".csv": lambda: scan_folder(paths[0].parent, splits, columns),
    }
    suffix = paths[0].suffix.lower()
    if suffix not in readers or any(path.suffix.lower() != suffix for path in paths):
        raise DataError(f"{paths[0]}: files ending in {suffix or 'nothing'} are no known source; give {_KNOWN}")
    return readers[suffix]()
