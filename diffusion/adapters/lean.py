"""Leaner ways through a LoRA layer than peft's, which casts, scales and adds, each a pass over all activations.

Two products, the second of which adds itself to the base's output; or, where factors train in bfloat16 on a GPU, one
product with the sum of the weights (`diffusion.models.kernels.low_rank`), which a block makes for all of its layers at
once when it begins. What is computed is the same, but for rounding; DoRA, convolutions and layers with several acting
adapters go peft's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.models.kernels.low_rank import LowRank, can_sum, summed_linear, summed_weights, takes_sum


def make_lean(network: nn.Module) -> None:
    """Let the LoRA layers of a network that can take the lean way."""
    from peft.tuners.lora.layer import Linear

    for module in network.modules():
        if type(module) is Linear and isinstance(module.get_base_layer(), nn.Linear):
            module.__class__ = _lean_linear()  # peft offers no way to say which class it shall make


def sum_ahead(network: Any) -> None:
    """Let each block of a network that trains sum up all weights of its LoRA layers in one launch when it begins."""
    stop_sums(network)
    for block in network.blocks:
        sums = _SumsAhead(block)
        block.register_forward_pre_hook(sums.begin)
        block.register_forward_hook(sums.end)


def stop_sums(network: Any) -> None:
    """Undo `sum_ahead`."""
    for block in network.blocks:
        for hooks in (block._forward_pre_hooks, block._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _SumsAhead):
                    del hooks[key]


def by_sum(layers: Sequence[Any], x: Tensor) -> Tensor | None:
    """The outputs of layers that read the same x, one after another, by a sum of their weights; None = not possible."""
    parts = _low_rank(layers)
    if parts is None or not takes_sum(x, parts):
        return None
    return summed_linear(x, parts, layers[0].ahead)


def _low_rank(layers: Sequence[Any]) -> list[LowRank] | None:
    """Weights and factors of layers, of all or none."""
    if not torch.is_grad_enabled():  # strengths may change, which compiled blocks must not look at
        return None
    parts = [layer.low_rank() if hasattr(layer, "low_rank") else None for layer in layers]
    given = [part for part in parts if part is not None]
    return given if len(given) == len(parts) else None


class _SumsAhead:
    """Hooks of a block; of layers that go together, the first keeps the sum."""

    def __init__(self, block: nn.Module) -> None:
        self.groups: list[list[Any]] = []
        module: Any
        for module in block.modules():
            parts = module.parts() if hasattr(module, "part_names") else [module]  # of a splitting.SplitProjection
            if all(hasattr(part, "low_rank") and not self._has(part) for part in parts):
                self.groups.append(parts)

    def _has(self, layer: nn.Module) -> bool:
        return any(layer is part for group in self.groups for part in group)

    def begin(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        summed: list[tuple[Any, list[LowRank]]] = []
        for layers in self.groups:
            parts = _low_rank(layers)
            if parts is not None and can_sum(arguments[0].device, parts):
                summed.append((layers[0], parts))
        if summed:
            for (layer, _), total in zip(summed, summed_weights([parts for _, parts in summed])):
                layer.ahead = total

    def end(self, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        for layers in self.groups:  # one that is called outside of its block sums up what its weights are then
            layers[0].ahead = None


@cache
def _lean_linear() -> Any:
    """The class, which needs peft."""
    from peft.tuners.lora.layer import Linear

    class LeanLinear(Linear):
        """y = base(x) + scale * (x down^T) up^T: x (..., in) -> (..., out)."""

        ahead: Tensor | None = None  # the sum of its weights, or of all parts of its projection, while its block runs

        def set_scale(self, adapter: str, scale: float) -> None:
            super().set_scale(adapter, scale)
            if adapter in self.scaling:
                # For compiled blocks: a number would be compiled in, anew for each strength that a page asks for.
                self.scales = {**getattr(self, "scales", {}), adapter: torch.tensor(self.scaling[adapter])}

        def acting(self) -> str | None:
            """The adapter that acts here, if it is one alone, and no other form of it than LoRA."""
            names = [name for name in self.active_adapters if name in self.lora_A]
            return None if self.disable_adapters or self.merged or len(names) != 1 or self.lora_variant else names[0]

        def low_rank(self) -> LowRank | None:
            """Weights and factors of a layer on which one adapter acts, beside a base that is not quantised."""
            name, base = self.acting(), self.base_layer
            if name is None or not isinstance(base, nn.Linear):
                return None
            return LowRank(base.weight, base.bias, *self.factors(name), float(self.scaling[name]))

        def factors(self, name: str) -> tuple[Tensor, Tensor]:
            """down (rank, in) and up (out, rank) of an adapter."""
            pair: list[Any] = [self.lora_A[name], self.lora_B[name]]
            return pair[0].weight, pair[1].weight

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = self.acting()
            if args or kwargs or name is None:
                other: Tensor = super().forward(x, *args, **kwargs)
                return other
            summed = by_sum([self], x)
            if summed is not None:
                return summed
            output = self.base_layer(x)
            down, up = self.factors(name)
            if not torch.is_autocast_enabled(x.device.type):  # which casts what products get
                # The base's output, since an int8 base computes in a precision of its own.
                x, down, up = (tensor.to(output.dtype) for tensor in (x, down, up))
            product, alpha = F.linear(x, down).flatten(0, -2), 1.0
            if torch.compiler.is_compiling() and name in getattr(self, "scales", {}):
                product = product * self.scales[name]
            else:
                alpha = float(self.scaling[name])
            summed = torch.addmm(output.flatten(0, -2), product, up.t(), alpha=alpha)
            return summed.view(output.shape)

    return LeanLinear
