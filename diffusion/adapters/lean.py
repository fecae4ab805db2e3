"""A leaner way through a LoRA layer than peft's: two products, the second of which adds itself to the base's output.

peft casts the input to the factors' precision, scales the product and adds it, each a pass over all activations. What
is computed is the same; DoRA, convolutions and layers with several acting adapters go peft's way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def make_lean(network: nn.Module) -> None:
    """Let the LoRA layers of a network that can take the lean way."""
    from peft.tuners.lora.layer import Linear

    for module in network.modules():
        if type(module) is Linear and isinstance(module.get_base_layer(), nn.Linear):
            module.__class__ = _lean_linear()  # peft offers no way to say which class it shall make


@cache
def _lean_linear() -> Any:
    """The class, which needs peft."""
    from peft.tuners.lora.layer import Linear

    class LeanLinear(Linear):
        """y = base(x) + scale * (x down^T) up^T: x (..., in) -> (..., out)."""

        def set_scale(self, adapter: str, scale: float) -> None:
            super().set_scale(adapter, scale)
            if adapter in self.scaling:
                # For compiled blocks: a number would be compiled in, anew for each strength that a page asks for.
                self.scales = {**getattr(self, "scales", {}), adapter: torch.tensor(self.scaling[adapter])}

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            names = [name for name in self.active_adapters if name in self.lora_A]
            if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or self.lora_variant:
                other: Tensor = super().forward(x, *args, **kwargs)
                return other
            name = names[0]
            output = self.base_layer(x)
            factors: list[Any] = [self.lora_A[name], self.lora_B[name]]
            down, up = (factor.weight for factor in factors)
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
