"""Training an adapter: the frozen network around it, its files at the end, and whether it has done anything."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from diffusion.adapters import (
    Adapter,
    adapter_parameters,
    quantize_base,
    read_adapter_from,
    relative_norms,
    start_lora,
    write_adapter,
)
from diffusion.config import TrainConfig
from diffusion.errors import ConfigError
from diffusion.models import PixArt

_LOG = logging.getLogger("pixart")
_DTYPES = {"fp32": torch.float32, "no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FAINT = 1e-3  # a change below this share of every weight is taken for none


def base_of_adapter(config: TrainConfig) -> str | None:
    """The weights under the adapter of a run, which its checkpoints do not hold; None for other runs.

    Raises:
        ConfigError: a run with an adapter does not say them.
    """
    if config.lora is None:
        return None
    if config.load_from is None:
        raise ConfigError("lora needs load_from: the model that the adapter is for")
    return config.load_from


def adapt(network: PixArt, config: TrainConfig) -> None:
    """Freeze a network in the precision of `lora.base_dtype` and give it an adapter to train.

    The factors are drawn from torch's global generator, and are float32.
    """
    settings = config.lora
    assert settings is not None
    dtype = config.mixed_precision if settings.base_dtype in ("auto", "int8") else settings.base_dtype
    network.to(_DTYPES[dtype])
    start_lora(
        network,
        settings.rank,
        alpha=settings.alpha,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
    )
    if settings.base_dtype == "int8":
        quantize_base(network)
    trained = sum(parameter.numel() for parameter in adapter_parameters(network).values())
    _LOG.info("adapter of rank %d: %.2f M parameters train, the model is frozen", settings.rank, trained / 1e6)


def export_adapter(network: PixArt, config: TrainConfig, folder: Path) -> Adapter:
    """Write the adapter of a finished run in all layouts, and say how much it changes and where nothing was learned."""
    assert config.lora is not None
    adapter = replace(read_adapter_from(network), source=str(folder), base_model=config.load_from or "")
    write_adapter(adapter, folder, dtype=_DTYPES[config.lora.save_dtype])
    report_effect(adapter, relative_norms(network, adapter))
    return adapter


def report_effect(adapter: Adapter, norms: Mapping[str, float]) -> None:
    """Log |change| / |weight| by kind of layer; warn of layers without a gradient and of a change too small to see."""
    kinds: dict[str, list[float]] = {}
    for name, value in norms.items():
        parts = name.split(".")
        kinds.setdefault(".".join(parts[2:]) if parts[0] == "transformer_blocks" else name, []).append(value)
    _LOG.info("change of the weights by the adapter, |change| / |weight|:")
    for kind, values in kinds.items():
        _LOG.info("  %-50s mean %.2e  largest %.2e  (%d layers)", kind, mean(values), max(values), len(values))
    dead = [name for name, factors in adapter.layers.items() if not factors.up.any()]
    if dead:
        shown = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
        _LOG.warning("%d of %d layers got no gradient: %s", len(dead), len(norms), shown)
    if max(norms.values()) < _FAINT:
        _LOG.warning(
            "the adapter changes no weight by more than %.1e of its size and will not be seen; raise the learning rate "
            "(1e-4 is usual for LoRA) or train longer",
            max(norms.values()),
        )
