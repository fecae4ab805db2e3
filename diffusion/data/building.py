"""From a config's data section to a data set and a loader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from diffusion.data.batch import collate
from diffusion.data.classes import give_classes
from diffusion.data.mixed_stores import MixedStores
from diffusion.data.original_datasets import (
    OriginalLayout,
    internal_dataset,
    internal_hed_dataset,
    internal_ms_dataset,
    sam_dataset,
)
from diffusion.data.sampler import SampleKey
from diffusion.data.store_dataset import StoreDataset
from diffusion.errors import ConfigError, DataError
from diffusion.features import FeatureStore
from diffusion.features.access import is_url
from diffusion.features.manifest import differences


def build_dataset(
    data: Mapping[str, Any],
    *,
    image_size: int,
    aspect_ratio_type: str | None,
    model_max_length: int,
    seed: int,
    data_root: str | Path,
    train_ratio: float = 1.0,
) -> StoreDataset | MixedStores | OriginalLayout:
    """The data set that a config's `data` section names; a relative root lies below `data_root`.

    Args:
        train_ratio: share of the list that InternalDataHed uses.
    Raises:
        ConfigError: a type whose training is not offered, or a missing bucket table.
        DataError: missing or damaged data.
    """
    kind = data["type"]
    if kind == "Store":
        return _stores(data, image_size, aspect_ratio_type, model_max_length, seed, Path(data_root))
    root = _spelled(Path(data_root) / data["root"])
    if not (data["load_vae_feat"] and data["load_t5_feat"]):
        raise ConfigError(f"data.type={kind!r} needs load_vae_feat=True and load_t5_feat=True: extract features first")
    if kind == "SAM":
        return sam_dataset(root, data["image_list_txt"], image_size, model_max_length)
    if kind == "InternalData":
        return internal_dataset(root, data["image_list_json"], image_size, model_max_length)
    if kind == "InternalDataMS":
        if aspect_ratio_type is None:
            raise ConfigError("data.type='InternalDataMS' needs multi_scale=True and aspect_ratio_type")
        return internal_ms_dataset(root, data["image_list_json"], image_size, aspect_ratio_type, model_max_length)
    if kind == "InternalDataHed":
        return internal_hed_dataset(root, data["image_list_json"], image_size, model_max_length, train_ratio)
    raise ConfigError(f"data.type={kind!r} is not read by this program; use Store, SAM, InternalData or InternalDataMS")


def _stores(
    data: Mapping[str, Any],
    image_size: int,
    aspect_ratio_type: str | None,
    model_max_length: int,
    seed: int,
    data_root: Path,
) -> StoreDataset | MixedStores:
    weights = {data["root"]: 1.0, **(data.get("mix") or {})}
    stores: list[StoreDataset] = []
    for name in weights:
        place = name if is_url(name) else data_root / name
        dataset = StoreDataset(place, split=data.get("split"), seed=seed, max_captions=data.get("max_captions"))
        # A network of many shapes takes further stores of any size.
        size = None if stores and aspect_ratio_type is not None else image_size
        check_store_fits(dataset.store, size, aspect_ratio_type, model_max_length)
        stores.append(dataset)
    if data.get("class_by") is not None:
        give_classes(stores, data["class_by"])
    if len(stores) == 1 and set(weights.values()) == {1.0}:
        return stores[0]
    return MixedStores(stores, list(weights.values()), any_size=aspect_ratio_type is not None)


def check_store_fits(
    store: FeatureStore, image_size: int | None, aspect_ratio_type: str | None, model_max_length: int
) -> None:
    """Refuse a store that was extracted for another config.

    Args:
        image_size: px; None = any size, in buckets or square.
    Raises:
        DataError: every setting that differs, and the command that makes a fitting store.
    """
    wanted: dict[str, Any] = {"max_length": model_max_length}
    if image_size is not None:
        wanted |= {"image_size": image_size, "multi_scale": aspect_ratio_type is not None}
    stored = {name: store.fingerprint[name] for name in wanted if name in store.fingerprint}
    differing = differences(stored, {name: wanted[name] for name in stored})
    if differing:
        scale = " --multi-scale" if aspect_ratio_type is not None else ""
        size = image_size or store.fingerprint.get("image_size")
        raise DataError(
            f"{store.root} was extracted for another config: {', '.join(differing)}; change the config, or run `python "
            f"tools/extract_features.py SOURCE --out NEW_FOLDER --image-size {size}{scale} --max-length "
            f"{model_max_length}`"
        )


def _spelled(root: Path) -> Path:
    """The root as given or, when that does not exist, in the other of the original's two spellings."""
    text = root.as_posix()
    other = Path(
        text.replace("InternalData", "InternData")
        if "InternalData" in text
        else text.replace("InternData", "InternalData")
    )
    return other if not root.exists() and other.exists() else root


def build_loader(
    dataset: Any, sampler: Iterable[list[SampleKey]], num_workers: int, *, pin_memory: bool = False
) -> DataLoader[Any]:
    """A loader of `TrainBatch`es in the sampler's order; workers live as long as the loader."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_process_group,
    )


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and SIGTERM may go to a whole process group; a worker that they end could not feed the last step."""
    os.setpgid(0, 0)
