"""Adapters in a pipeline, under the names that diffusers' pipelines use; diffusers itself has none for PixArt."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion.adapters import adapter_names as names_in
from diffusion.adapters import (
    add_adapter,
    is_merged,
    merge,
    read_adapter,
    remove_adapters,
    set_scales,
    unmerge,
)
from diffusion.errors import CheckpointError, PromptError
from diffusion.inference.fp8 import is_quantized
from diffusion.inference.memory import Residency

_LOG = logging.getLogger(__name__)


class LoraAdapters:
    """Mixed into the pipeline: load, weigh, merge and remove adapters of `transformer`, under a memory plan as well."""

    transformer: Any
    _residency: Residency | None
    _scales: dict[str, float]

    def load_lora_weights(
        self, source: str | Path, adapter_name: str | None = None, *, weight_name: str | None = None
    ) -> None:
        """Put a LoRA or DoRA beside those that are loaded, all of which act.

        Args:
            source: file, folder (peft's, diffusers' or ComfyUI's layout), run folder or hub id.
            adapter_name: for `set_adapters`; None = "default_0", "default_1", ...
            weight_name: of the file in a folder, when it has none of the usual names.
        Raises:
            CheckpointError: no such adapter, or one of another model; nothing has changed then. PromptError: others are
                fused, or the network is in FP8.
        """
        self._refuse_fp8("load adapters")
        if is_merged(self.transformer):
            raise PromptError("adapters are fused; unfuse_lora() before another is loaded")
        adapter = read_adapter(source, weight_name)
        name = adapter_name or f"default_{len(names_in(self.transformer))}"
        if not adapter.has_effect:
            _LOG.warning("LoRA %s changes nothing: its factors are zero, as before training", source)
        network = self.transformer
        with self._changing():
            dtype, device = network.dtype, network.device
            add_adapter(network, adapter, name)
            network.to(device=device, dtype=dtype)
        self.set_adapters([*self.get_list_adapters(), name], [*self._own_scales().values(), 1.0])

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Let these adapters act, each with its weight (1 = as trained, 0 = not at all), and no others.

        Raises:
            PromptError: an adapter that is not loaded, another number of weights, or adapters that are fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, (int, float)) else list(adapter_weights)
        loaded = names_in(self.transformer)
        if missing := [name for name in names if name not in loaded]:
            raise PromptError(f"adapter {missing[0]!r} is not loaded; loaded are {', '.join(loaded) or 'none'}")
        if len(weights) != len(names):
            raise PromptError(f"{len(weights)} adapter_weights for {len(names)} adapters; give one each")
        if bad := [weight for weight in weights if not math.isfinite(weight)]:
            raise PromptError(f"adapter_weights has {bad[0]}; give finite numbers (1 = as trained)")
        if is_merged(self.transformer):
            raise PromptError("adapters are fused at their scales; unfuse_lora() before they are changed")
        self._scales = dict(zip(names, map(float, weights)))
        set_scales(self.transformer, self._scales)

    def get_list_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return list(self._own_scales())

    def disable_lora(self) -> None:
        """Draw without adapters, which stay loaded."""
        set_scales(self.transformer, {})

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        set_scales(self.transformer, self._own_scales())

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add the acting adapters to the weights, times `lora_scale`: drawing then costs what the base costs."""
        self._refuse_fp8("fuse adapters")
        if not self._own_scales():
            raise PromptError("no adapter is loaded; load_lora_weights first")
        if is_merged(self.transformer):
            raise PromptError("adapters are fused already; unfuse_lora() first")
        set_scales(self.transformer, {name: scale * lora_scale for name, scale in self._own_scales().items()})
        with self._changing():
            merge(self.transformer, self.get_list_adapters())

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, up to rounding."""
        with self._changing():
            unmerge(self.transformer)
        set_scales(self.transformer, self._own_scales())

    def unload_lora_weights(self) -> None:
        """Remove all adapters; what was fused stays in the weights."""
        with self._changing():
            remove_adapters(self.transformer)
        self._scales = {}

    def _own_scales(self) -> dict[str, float]:
        return getattr(self, "_scales", {})

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        """Around every change of layers or weights: a memory plan holds the weights in a block, and takes them anew."""
        return contextlib.nullcontext() if self._residency is None else self._residency.changing("transformer")

    def _refuse_fp8(self, what: str) -> None:
        if is_quantized(self.transformer):
            raise PromptError(f"{what} before the network is put into FP8; load the pipeline again")


def fuse_into(pipeline: Any, adapters: Sequence[str], scales: Sequence[float]) -> list[dict[str, Any]]:
    """Fuse adapters into a pipeline for good, so that any memory plan and every later step sees a plain network.

    Args:
        scales: one for all, or one each; none = 1.
    Returns:
        what a recipe says about them.
    Raises:
        PromptError: another number of scales. CheckpointError: see `load_lora_weights`.
    """
    weights = [float(scale) for scale in scales] or [1.0]
    weights = weights * len(adapters) if len(weights) == 1 else weights
    if len(weights) != len(adapters):
        raise PromptError(f"{len(weights)} --lora_scale for {len(adapters)} --lora; give one each, or one for all")
    for number, source in enumerate(adapters):
        pipeline.load_lora_weights(source, f"lora_{number}")
    pipeline.set_adapters([f"lora_{number}" for number in range(len(adapters))], weights)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return [{"lora": str(source), "scale": scale} for source, scale in zip(adapters, weights)]


def require_plain(network: Any, what: str) -> None:
    """Raises CheckpointError: the network holds adapters, for which `what` has no place."""
    if names_in(network):
        raise CheckpointError(
            f"{what} with loaded adapters: fuse_lora() and unload_lora_weights() first, or unload them"
        )
