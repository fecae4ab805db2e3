"""Files of DiT: the public `DiT-XL-2-256x256.pt`, and folders of runs that train one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from diffusion.errors import CheckpointError
from diffusion.models import DiTConfig, preset_heads

DIT_CLASS = "DiT"  # `_class_name` in the config.json of a run's folder
_LABELS = "y_embedder.embedding_table.weight"


def is_dit(keys: Iterable[str]) -> bool:
    """Whether keys are those of a class-conditional DiT."""
    return _LABELS in keys


def dit_fields(config: DiTConfig) -> dict[str, Any]:
    """Fields of `config.json`."""
    return {"_class_name": DIT_CLASS, **asdict(config)}


def dit_from_fields(fields: Mapping[str, Any], source: str) -> DiTConfig:
    """Inverse of `dit_fields`.

    Raises:
        CheckpointError: the fields describe no DiT of this version.
    """
    try:
        return DiTConfig(**{key: value for key, value in fields.items() if key != "_class_name"})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json describes no DiT ({error})") from error


def recognise_dit(state_dict: Mapping[str, Tensor], source: str, *, num_heads: int | None = None) -> DiTConfig:
    """The config of DiT weights, from their shapes.

    Args:
        num_heads: no shape tells it, except that DiT-XL/2 has 16.
    Raises:
        CheckpointError: weights are missing, or num_heads is neither known nor given.
    """
    try:
        width, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
        depth = 1 + max(int(match[1]) for key in state_dict if (match := re.match(r"blocks\.(\d+)\.", key)))
        outputs = state_dict["final_layer.linear.weight"].shape[0]
        hidden = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
        tokens = state_dict["pos_embed"].shape[-2]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source} has the classes of a DiT, but not its other weights ({error})") from error
    heads = preset_heads(width, depth) if num_heads is None else num_heads
    if heads is None:
        raise CheckpointError(f"{source}: no shape tells the heads of {depth} blocks of width {width}; give num_heads")
    fields = {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": hidden / width,
        "pred_sigma": outputs == 2 * channels * patch**2,
        "num_classes": state_dict[_LABELS].shape[0] - 1,
    }
    return dit_from_fields(fields, source)
