"""Weight-only int8 for the linear layers of a text encoder: half the memory of 16 bits, no further package.

Each output channel keeps its largest magnitude as a scale (symmetric absmax, LLM.int8 Sec. 2.1, arXiv:2208.07339);
activations are not quantised. Weights are ordinary int8 tensors, so they load, move and stream like any others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 (out, in) times a scale (out, 1).

    The weight is restored to the layer's former dtype for each product: float32 for the layers that a float16 T5 keeps
    in float32, because their products overflow.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, device: str | torch.device | None = None) -> None:
        """Quantise `linear`; device: where the arithmetic runs (None = where the weight lies), the result stays."""
        super().__init__()
        original = linear.weight.detach()
        weight = original.to(device).float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8).to(original.device))
        self.register_buffer("scale", scale.to(original.device, original.dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        output: Tensor = _Restored.apply(inputs.to(self.scale.dtype), self.weight, self.scale, self.bias)
        return output


class _Restored(torch.autograd.Function):
    """A product with a weight that is restored for it, and once more for its gradient, and not kept between the two."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(inputs, weight.to(scale.dtype) * scale, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return gradients[0].to(scale.dtype) @ (weight.to(scale.dtype) * scale), None, None, None


def quantize_linears(model: nn.Module, device: str | torch.device | None = None) -> int:
    """Replace every `nn.Linear` of a model by its int8 form, one at a time; returns how many were replaced.

    Args:
        device: where the arithmetic runs; None = where each weight lies.
    """
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name in found:
        setattr(parent, name, Int8Linear(getattr(parent, name), device))
    return len(found)
