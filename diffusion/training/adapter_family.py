"""What a checkpoint holds of a run that trains an adapter: peft's files alone, not the frozen network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from diffusion.adapters import (
    Adapter,
    adapter_parameters,
    read_adapter,
    read_adapter_from,
    write_factors,
    write_layout,
)
from diffusion.checkpoints.keys import NATIVE_ONLY
from diffusion.config import TrainConfig
from diffusion.training.family import Family
from diffusion.training.optimization import trained_state
from diffusion.training.sharding import gather, parts_like


def family_of(config: TrainConfig) -> Family:
    """The family that a config alone asks for."""
    return Family() if config.lora is None else AdapterFamily(config.load_from or "")


class AdapterFamily(Family):
    """peft's files in the checkpoint folder itself, so that it opens as an adapter; the average in `lora_ema/`."""

    resumes_from_start = True

    def __init__(self, base_model: str) -> None:
        self.base_model = base_model
        self._base_fingerprint = ""

    def build_network(self, config: TrainConfig, start: str | Path | None, *, resuming: bool) -> Any:
        network = super().build_network(config, start, resuming=resuming)
        left_out, digest = {*trained_state(network), *NATIVE_ONLY}, xxhash.xxh3_64()  # what not all files hold
        for name, tensor in network.state_dict().items():
            if name not in left_out:
                digest.update(name.encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)  # where it lies
        self._base_fingerprint = digest.hexdigest()
        return network

    def facts(self) -> dict[str, Any]:
        return {"fingerprint_of_base": self._base_fingerprint}

    def write(
        self, tensors: Mapping[str, Tensor], network: Any, folder: Path, *, ema: bool, stored_null_caption: bool
    ) -> None:
        adapter = replace(read_adapter_from(network, values=tensors), base_model=self.base_model)
        write_layout(adapter, _folder(folder, ema), "peft")

    def restore(self, network: Any, folder: Path, *, ema: bool) -> None:
        """Raises CheckpointError: no adapter there, or of another rank."""
        load_adapter(network, read_adapter(_folder(folder, ema)))


def load_adapter(network: Any, adapter: Adapter) -> None:
    """`write_factors` into a network that may be sharded.

    Raises:
        CheckpointError: other layers or ranks than the network's adapter has.
    """
    own = adapter_parameters(network)
    held = gather(own, keep=True)
    write_factors(network, adapter, values=held)
    network.load_state_dict(parts_like(own, held), strict=False)


def _folder(folder: Path, ema: bool) -> Path:
    return folder / "lora_ema" if ema else folder
