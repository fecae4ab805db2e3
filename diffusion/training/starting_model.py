"""Fine-tuning starts from a model, not from a config: what the config must say is read from the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from diffusion.checkpoints import read_transformer
from diffusion.checkpoints.hub import no_such_path
from diffusion.config import TrainConfig
from diffusion.config.problems import KeyPath, explain
from diffusion.errors import CheckpointError, ConfigError
from diffusion.features.extract import Encoders
from diffusion.inference.folders import pipeline_folder
from diffusion.models import PixArtConfig


def model_keys(model: str, image_size: int | None = None) -> dict[str, Any]:
    """Config keys of a network that goes on from the weights of a pipeline.

    Args:
        model: pipeline folder, or a model of the hub.
        image_size: px to train at; None = the model's. Positions are stretched as at its own size.
    Raises:
        CheckpointError: no such model, or one that the trainer cannot build.
    """
    folder = pipeline_folder(model)
    if not folder.exists():
        raise CheckpointError(
            f"{no_such_path(model)}; give a diffusers pipeline folder, or the name of a model of the hub, OWNER/NAME"
        )
    missing = [name for name in ("transformer", "text_encoder", "tokenizer", "vae") if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{model} is no diffusers pipeline (it has no {', '.join(missing)}); give a folder or a model of the hub "
            "with all its parts"
        )
    network, _ = read_transformer(folder)
    if not isinstance(network, PixArtConfig):
        raise CheckpointError(
            f"{model} is a class-conditional DiT; make a PixArt of it with tools/init_from_dit.py first"
        )
    if network.patch_size != 2 or not math.isclose(network.mlp_ratio, 4) or network.kv_compress is not None:
        raise CheckpointError(f"{model}: only networks with patches of 2 and no kv compression are fine-tuned here")
    trained = network.input_size * 8
    size = trained if image_size is None else image_size
    scale = network.pe_interpolation * size / trained
    _, vae = Encoders.find(folder).configs()
    return {
        "model": "PixArtMS_XL_2" if network.micro_condition else "PixArt_XL_2",
        "hidden_size": network.hidden_size,
        "depth": network.depth,
        "num_heads": network.num_heads,
        "micro_condition": network.micro_condition,
        "qk_norm": network.qk_norm,
        "pred_sigma": network.pred_sigma,
        "caption_channels": network.caption_channels,
        "model_max_length": network.model_max_length,
        "lewei_scale": scale,
        "pe_interpolation": scale,
        "image_size": size,
        "scale_factor": float(vae["scaling_factor"]),
        "null_caption": "t5_empty",
        "process": {"prediction_type": network.prediction_type, "flow_shift": network.flow_shift},
        "load_from": model,
        "pipeline_load_from": str(folder),
    }


def checked_config(keys: Mapping[str, Any], place: Callable[[KeyPath], str]) -> TrainConfig:
    """A validated config from keys that no file holds.

    Args:
        place: names what set a key, for the error.
    Raises:
        ConfigError: one line naming place, key, value and rule.
    """
    try:
        return TrainConfig.model_validate(dict(keys))
    except ValidationError as error:
        raise explain(error, TrainConfig, place) from None


def require_multiple_of_16(size: int | None, flag: str) -> None:
    """Raises ConfigError."""
    if size is not None and (size <= 0 or size % 16):
        raise ConfigError(f"{flag}={size} must be a positive multiple of 16 px")
