"""The original's folder layouts with their feature files: SAM, InternalData, InternalDataMS, InternalDataHed.

Nothing is replaced silently: a missing or damaged feature file is an error that names it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.data.batch import TrainSample
from diffusion.data.sampler import SampleKey
from diffusion.errors import DataError
from diffusion.features import read_caption_npz, read_latents_npy
from diffusion.features.original import feature_names, read_condition_npz
from diffusion.images import aspect_ratio_table, closest_bucket

_LOG = logging.getLogger(__name__)

# The original kept pictures with height / width up to 4; the same bound holds for wide ones.
MAX_RATIO = 4.0


@dataclass(frozen=True)
class _Entry:
    key: str
    caption: Path
    latents: Path
    image_hw: tuple[float, float]
    aspect_ratio: float
    bucket: tuple[int, int]
    control: Path | None = None


class OriginalLayout:
    """Samples that are pairs of a caption `.npz` and a latent `.npy`."""

    def __init__(self, entries: Sequence[_Entry], root: Path, model_max_length: int) -> None:
        if not entries:
            raise DataError(f"{root}: no samples; check the partition files and the ratio limit of {MAX_RATIO:g}")
        files = [path for entry in entries for path in (entry.caption, entry.latents, entry.control)]
        missing = [path for path in files if path is not None and not path.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]} does not exist ({len(missing)} feature files are missing); extract them first"
            )
        owners: dict[Path, str] = {}
        for entry in entries:
            other = owners.setdefault(entry.latents, entry.key)
            if other != entry.key:
                raise DataError(f"{entry.latents} is the feature file of both {other!r} and {entry.key!r}; rename one")
        self.entries, self.root, self.model_max_length = list(entries), root, model_max_length
        self.buckets = [entry.bucket for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def attribute(self, name: str) -> list[str]:
        raise DataError(f"{self.root}: this layout has no attribute {name!r}; balance_by needs a Store")

    def caption_of(self, key: SampleKey) -> str:
        """The picture's name: this layout keeps no texts beside its features."""
        return self.entries[key.index].key

    def __getitem__(self, key: SampleKey) -> TrainSample:
        entry = self.entries[key.index]
        mean, std = read_latents_npy(entry.latents)
        expected = (entry.bucket[0] // 8, entry.bucket[1] // 8)
        if tuple(mean.shape[1:]) != expected:
            raise DataError(f"{entry.latents} holds latents of {tuple(mean.shape[1:])}, its bucket needs {expected}")
        embeds = read_caption_npz(entry.caption, self.model_max_length)
        sample = TrainSample(mean, std, embeds, entry.image_hw, entry.aspect_ratio, key.number, entry.key)
        if entry.control is not None:
            sample.control_mean, sample.control_std = read_condition_npz(entry.control)
        return sample

    @property
    def has_conditions(self) -> bool:
        """Whether samples carry what a ControlNet follows."""
        return self.entries[0].control is not None


def sam_dataset(root: Path, image_list_txt: Sequence[str], image_size: int, model_max_length: int) -> OriginalLayout:
    """SA1B layout: partition/*.txt name pictures; features in caption_feature_wmask and img_vae_feature."""
    captions = _folders(root, "caption_feature_wmask", "caption_features")
    latents = _folders(root, f"img_vae_feature/train_vae_{image_size}/noflip", *_extracted(image_size))
    size = (float(image_size), float(image_size))
    entries = []
    for name in _lines(root, image_list_txt):
        files = _file(captions, [name], ".npz"), _file(latents, [name], ".npy")
        entries.append(_Entry(name, *files, size, 1.0, (image_size, image_size)))
    return OriginalLayout(entries, root, model_max_length)


def internal_dataset(
    root: Path, image_list_json: Sequence[str], image_size: int, model_max_length: int
) -> OriginalLayout:
    """InternalData: square pictures listed in partition/*.json."""
    captions = _folders(root, "caption_feature_wmask", "caption_features")
    latents = _folders(root, *_extracted(image_size))
    size = (float(image_size), float(image_size))
    entries = []
    for item in _items(root, image_list_json, ("partition", "")):
        names = feature_names(item["path"])
        files = _file(captions, names, ".npz"), _file(latents, names, ".npy")
        entries.append(_Entry(item["path"], *files, size, 1.0, (image_size, image_size)))
    return OriginalLayout(entries, root, model_max_length)


def internal_ms_dataset(
    root: Path, image_list_json: Sequence[str], image_size: int, table_name: str, model_max_length: int
) -> OriginalLayout:
    """InternalDataMS: pictures of many sizes in aspect-ratio buckets, listed in partition_filter/*.json."""
    captions = _folders(root, "caption_feature_wmask", "caption_features")
    read = [f"img_vae_{word}_{image_size}_multiscale/ms" for word in ("fatures", "features")]
    latents = _folders(root, *read, "img_vae_features/ms")
    table = aspect_ratio_table(table_name)
    entries = []
    for item in _items(root, image_list_json, ("partition_filter", "partition", "")):
        names = feature_names(item["path"])
        ratio = closest_bucket(item["height"], item["width"], table)
        size = (float(item["height"]), float(item["width"]))
        files = _file(captions, names, ".npz"), _file(latents, names, ".npy")
        entries.append(_Entry(item["path"], *files, size, float(ratio), table[ratio]))
    return OriginalLayout(entries, root, model_max_length)


def internal_hed_dataset(
    root: Path, image_list_json: Sequence[str], image_size: int, model_max_length: int, train_ratio: float = 1.0
) -> OriginalLayout:
    """InternalDataHed: square pictures with HED edges, listed in partition_filter/*.json.

    The size condition is the square's (the original said 1024 x 1024 at 512 px too).

    Args:
        train_ratio: this share of the list is used, from its beginning.
    """
    captions = _folders(root, "caption_features", "caption_feature_wmask")
    latents = _folders(root, *_extracted(image_size))
    edges = _folders(root, f"hed_feature_{image_size}")
    size = (float(image_size), float(image_size))
    items = _items(root, image_list_json, ("partition_filter", "partition", ""))
    entries = []
    for item in items[: max(1, int(len(items) * train_ratio))]:
        names = feature_names(item["path"])
        # The original keeps the picture's path here: a/b/c.jpg -> hed_feature_512/a/b/c.npz.
        edge = _file(edges, [Path(item["path"]).with_suffix("").as_posix(), *names], ".npz")
        files = _file(captions, names, ".npz"), _file(latents, names, ".npy")
        entries.append(_Entry(item["path"], *files, size, 1.0, (image_size, image_size), edge))
    return OriginalLayout(entries, root, model_max_length)


def _extracted(image_size: int) -> tuple[str, str]:
    """Folders of square latents: of the original's data sets, and as its extraction names them."""
    return f"img_vae_features_{image_size}resolution/noflip", f"img_vae_features/{image_size}resolution/noflip"


def _folders(root: Path, *names: str) -> list[Path]:
    """Those of several feature folders that exist, in the root or beside it; the first name comes first.

    The original's two steps do not agree on names, so whatever the one wrote the other reads here.
    """
    candidates = [folder / name for name in names for folder in (root, root.parent)]
    found = [path for path in candidates if path.is_dir()]
    if not found:
        raise DataError(f"{candidates[0]} does not exist; extract the features first")
    return found


def _file(folders: Sequence[Path], names: Sequence[str], suffix: str) -> Path:
    """The first feature file that exists, else the first that was looked for."""
    candidates = [folder / f"{name}{suffix}" for folder in folders for name in names]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _find(root: Path, name: str, folders: Sequence[str]) -> Path:
    for folder in folders:
        if (root / folder / name).is_file():
            return root / folder / name
    raise DataError(f"{root / folders[0] / name} does not exist; check data.root and the list of partition files")


def _lines(root: Path, names: Sequence[str]) -> list[str]:
    files = [_find(root, name, ("partition", "")) for name in names]
    return [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _items(root: Path, names: Sequence[str], folders: Sequence[str]) -> list[dict[str, Any]]:
    items, num_filtered = [], 0
    for name in names:
        path = _find(root, name, folders)
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error})") from error
        if not isinstance(content, list):
            raise DataError(f"{path} is not a list of objects with path, height, width and prompt")
        for number, item in enumerate(content):
            problem = _problem(item)
            if problem:
                raise DataError(f"{path} item {number}: {problem}")
            if 1 / MAX_RATIO <= item["height"] / item["width"] <= MAX_RATIO:
                items.append(item)
            else:
                num_filtered += 1
    if num_filtered:
        _LOG.warning(
            "%s: %d of %d pictures left out: height / width outside 1/4..4",
            root,
            num_filtered,
            len(items) + num_filtered,
        )
    return items


def _problem(item: Any) -> str | None:
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        return "has no path"
    if Path(item["path"]).is_absolute() or ".." in Path(item["path"]).parts:
        return f"path {item['path']!r} leaves the data root"
    sizes = (item.get("height"), item.get("width"))
    if not all(isinstance(size, (int, float)) and size > 0 for size in sizes):
        return f"height and width {sizes} must be positive numbers"
    return None
