"""What a checkpoint holds of the network: all of its weights as a diffusers folder, or an adapter alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from diffusion.adapters import read_adapter, read_adapter_from, write_factors, write_layout
from diffusion.checkpoints import load_weights, read_transformer, save_transformer
from diffusion.config import TrainConfig
from diffusion.models import PixArt


@dataclass(frozen=True)
class TransformerWeights:
    """`transformer/`, and the averaged weights in `transformer_ema/`."""

    def write(self, network: PixArt, folder: Path, *, averaged: bool, stored_null_caption: bool) -> None:
        name = "transformer_ema" if averaged else "transformer"
        save_transformer(network, folder / name, stored_null_caption=stored_null_caption)

    def read(self, network: PixArt, folder: Path, *, averaged: bool) -> None:
        """Raises CheckpointError: the weights do not fit."""
        _, weights = read_transformer(folder, ema=averaged)
        load_weights(network, weights, folder)


@dataclass(frozen=True)
class AdapterWeights:
    """peft's files in the checkpoint folder itself, so that it opens as an adapter; the average in `lora_ema/`."""

    base_model: str

    def write(self, network: PixArt, folder: Path, *, averaged: bool, stored_null_caption: bool) -> None:
        adapter = replace(read_adapter_from(network), base_model=self.base_model)
        write_layout(adapter, folder / "lora_ema" if averaged else folder, "peft")

    def read(self, network: PixArt, folder: Path, *, averaged: bool) -> None:
        """Raises CheckpointError: no adapter there, or of another rank."""
        write_factors(network, read_adapter(folder / "lora_ema" if averaged else folder))


def saved_weights(config: TrainConfig) -> TransformerWeights | AdapterWeights:
    """What checkpoints of a run hold."""
    return TransformerWeights() if config.lora is None else AdapterWeights(config.load_from or "")
