"""From a config to its levers: what the data has to bring, and which objective with which options."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from diffusion.config import TrainConfig
from diffusion.data import StoreDataset
from diffusion.errors import ConfigError, DataError
from diffusion.features.alignment import AlignmentFeatures
from diffusion.models import is_class_conditional, preset_depth
from diffusion.objectives import (
    Alignment,
    ClassDenoisingObjective,
    DenoisingObjective,
    Routing,
)


def prepare_for_levers(config: TrainConfig, dataset: Any) -> None:
    """Check the classes of a data set against the network, and give it the features that `repa` asks for.

    Raises:
        DataError: more classes than num_classes, or features of other pictures. ConfigError: a mix of stores.
    """
    for store_dataset in getattr(dataset, "stores", [dataset]):
        ids = getattr(store_dataset, "class_ids", None)
        if ids is not None and len(ids) and int(ids.max()) >= config.num_classes:
            raise DataError(
                f"data.class_by={config.data.class_by!r} has class {int(ids.max())}, the network has num_classes="
                f"{config.num_classes}; set it to {int(ids.max()) + 1} or more"
            )
    if config.repa is None:
        return
    if not isinstance(dataset, StoreDataset):
        raise ConfigError("repa needs data.type='Store' with one store: its features belong to one store")
    features = AlignmentFeatures(config.repa.features)
    features.require_store(dataset.store)
    dataset.alignment = features


def alignment_head(config: TrainConfig) -> tuple[int, int] | None:
    """Hidden width and channels of the projection that `repa` trains; None without it."""
    return None if config.repa is None else (config.repa.head_width, AlignmentFeatures(config.repa.features).channels)


def objective_kind(config: TrainConfig) -> tuple[type[DenoisingObjective], dict[str, Any]]:
    """The class of the objective, and its options beside those of `DenoisingObjective` without levers.

    Raises:
        ConfigError: blocks that the network has not, or that a lever cannot use.
    """
    if is_class_conditional(config.model):
        return ClassDenoisingObjective, {}
    return DenoisingObjective, {"routing": _routing(config), "alignment": _alignment(config)}


def _routing(config: TrainConfig) -> Routing | None:
    tread = config.tread
    if tread is None:
        return None
    depth = config.depth or preset_depth(config.model)
    last = depth - 2 if tread.last_block is None else tread.last_block
    if not tread.first_block <= last <= depth - 2:
        raise ConfigError(
            f"tread: blocks {tread.first_block}..{last} of {depth}; the span must begin before it ends, and end "
            f"before the last block ({depth - 1})"
        )
    compressing = set(config.kv_compress_config.kv_compress_layer) if config.kv_compress else set()
    if both := sorted(compressing & set(range(tread.first_block, last + 1))):
        raise ConfigError(
            f"tread routes around block {both[0]}, which compresses keys on the whole grid; move the span"
        )
    return Routing(tread.share, tread.first_block, last, _first_number_of(config, tread.until_step))


def _alignment(config: TrainConfig) -> Alignment | None:
    repa = config.repa
    if repa is None:
        return None
    depth = config.depth or preset_depth(config.model)
    if repa.block >= depth:
        raise ConfigError(f"repa.block={repa.block} must be below the network's {depth} blocks")
    return Alignment(repa.block, repa.weight, _first_number_of(config, repa.until_step))


def _first_number_of(config: TrainConfig, step: int | None) -> int | None:
    """Number of the first sample of an optimiser step."""
    if step is None:
        return None
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return step * config.train_batch_size * processes * config.gradient_accumulation_steps
