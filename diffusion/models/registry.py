"""The one registry of this project: model names of config files -> constructors."""

from __future__ import annotations

from typing import Any

from diffusion.errors import ConfigError, did_you_mean
from diffusion.models.pixart import CONFIG_FIELDS, PixArt, PixArtMS

_XL_2 = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2}
_TI_2 = {"hidden_size": 256, "depth": 10, "num_heads": 4, "patch_size": 2}

_MODELS: dict[str, tuple[type[PixArt], dict[str, Any]]] = {
    "PixArt_XL_2": (PixArt, _XL_2),
    "PixArtMS_XL_2": (PixArtMS, _XL_2),
    "PixArt_Ti_2": (PixArt, _TI_2),
    "PixArtMS_Ti_2": (PixArtMS, {**_TI_2, "micro_condition": False}),
}


def model_names() -> list[str]:
    """Names that `build_model` and the config key `model` accept."""
    return list(_MODELS)


def preset_heads(hidden_size: int, depth: int) -> int | None:
    """Attention heads of the preset with this width and depth; no shape of a weight tells them. None = no preset."""
    for _, preset in _MODELS.values():
        if (preset["hidden_size"], preset["depth"]) == (hidden_size, depth):
            return int(preset["num_heads"])
    return None


def build_model(name: str, **kwargs: Any) -> PixArt:
    """Build a network by its config name; kwargs are fields of `PixArtConfig`.

    Raises:
        ConfigError: unknown name or keyword (with the nearest valid one), or sizes that do not divide.
    """
    if name not in _MODELS:
        raise ConfigError(f"model={name!r} does not exist; {did_you_mean(name, model_names())}")
    for key in kwargs:
        if key not in CONFIG_FIELDS:
            raise ConfigError(f"model {name} has no option {key!r}; {did_you_mean(key, sorted(CONFIG_FIELDS))}")
    cls, preset = _MODELS[name]
    try:
        return cls(**{**preset, **kwargs})
    except ValueError as error:
        raise ConfigError(f"model {name}: {error}") from error


def PixArt_XL_2(**kwargs: Any) -> PixArt:
    """PixArt XL/2 (0.6 B) for one square size."""
    return build_model("PixArt_XL_2", **kwargs)


def PixArtMS_XL_2(**kwargs: Any) -> PixArt:
    """PixArt XL/2 (0.6 B) for many sizes."""
    return build_model("PixArtMS_XL_2", **kwargs)
