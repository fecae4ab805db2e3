"""The one registry of this project: model names of config files -> constructors."""

from __future__ import annotations

from typing import Any, TypeVar

from diffusion.errors import ConfigError, did_you_mean
from diffusion.models.dit import DIT_CONFIG_FIELDS, DiT
from diffusion.models.pixart import CONFIG_FIELDS, PixArt, PixArtMS

_Network = TypeVar("_Network", PixArt, DiT)
_XL_2 = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2}
_TI_2 = {"hidden_size": 256, "depth": 10, "num_heads": 4, "patch_size": 2}

_MODELS: dict[str, tuple[type[PixArt], dict[str, Any]]] = {
    "PixArt_XL_2": (PixArt, _XL_2),
    "PixArtMS_XL_2": (PixArtMS, _XL_2),
    "PixArt_Ti_2": (PixArt, _TI_2),
    "PixArtMS_Ti_2": (PixArtMS, {**_TI_2, "micro_condition": False}),
}
# Class-conditional networks of the first training stage.
_CLASS_MODELS: dict[str, dict[str, Any]] = {"DiT_XL_2": _XL_2, "DiT_Ti_2": _TI_2}


def model_names() -> list[str]:
    """Names that `build_model` and the config key `model` accept."""
    return [*_MODELS, *_CLASS_MODELS]


def is_class_conditional(name: str) -> bool:
    """Whether a model name stands for a DiT, which knows classes and no captions."""
    return name in _CLASS_MODELS


def preset_depth(name: str) -> int:
    """Blocks of a registered network."""
    preset = _CLASS_MODELS[name] if name in _CLASS_MODELS else _MODELS[name][1]
    return int(preset["depth"])


def preset_heads(hidden_size: int, depth: int) -> int | None:
    """Attention heads of the preset with this width and depth; no shape of a weight tells them. None = no preset."""
    for _, preset in _MODELS.values():
        if (preset["hidden_size"], preset["depth"]) == (hidden_size, depth):
            return int(preset["num_heads"])
    return None


def build_model(name: str, **kwargs: Any) -> Any:
    """Build a network by its config name; kwargs are fields of `PixArtConfig`, or of `DiTConfig` for DiT_* names.

    Returns:
        `PixArt`, or `DiT`.
    Raises:
        ConfigError: unknown name or keyword (with the nearest valid one), or sizes that do not divide.
    """
    if name in _CLASS_MODELS:
        return _build(DiT, name, _CLASS_MODELS[name], DIT_CONFIG_FIELDS, kwargs)
    if name not in _MODELS:
        raise ConfigError(f"model={name!r} does not exist; {did_you_mean(name, model_names())}")
    cls, preset = _MODELS[name]
    return _build(cls, name, preset, CONFIG_FIELDS, kwargs)


def _build(
    cls: type[_Network], name: str, preset: dict[str, Any], known: frozenset[str], kwargs: dict[str, Any]
) -> _Network:
    for key in kwargs:
        if key not in known:
            raise ConfigError(f"model {name} has no option {key!r}; {did_you_mean(key, sorted(known))}")
    try:
        return cls(**{**preset, **kwargs})
    except ValueError as error:
        raise ConfigError(f"model {name}: {error}") from error


def PixArt_XL_2(**kwargs: Any) -> PixArt:
    """PixArt XL/2 (0.6 B) for one square size."""
    network: PixArt = build_model("PixArt_XL_2", **kwargs)
    return network


def PixArtMS_XL_2(**kwargs: Any) -> PixArt:
    """PixArt XL/2 (0.6 B) for many sizes."""
    network: PixArt = build_model("PixArtMS_XL_2", **kwargs)
    return network
