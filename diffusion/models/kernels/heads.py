"""Projections to and from attention heads, which may be wider in the kernel than in the weights.

Padding the weights costs nothing beside padding the tokens: they are small. The added rows and columns are constants,
so no gradient reaches them, and weights, optimiser and checkpoints keep their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.models.kernels.availability import can_run, product_dtype
from diffusion.models.kernels.fp8 import rounds_by_row


def to_heads(layer: nn.Module, tokens: Tensor, channels: int, width: int | None = None, spare: float = 0.0) -> Tensor:
    """(B, N, D) -> (B, N, G, channels): a projection, cut into its G heads (or heads of q, k and v).

    Args:
        width: pad each head up to it, with zeros; None = no padding.
        spare: value of the first padded channel.
    """
    if width is None or type(layer) is not nn.Linear:  # of an adapter, or another arithmetic, the output alone is known
        return widened(layer(tokens).unflatten(-1, (-1, channels)), width, spare)
    weight = F.pad(layer.weight.unflatten(0, (-1, channels)), (0, 0, 0, width - channels)).flatten(0, 1)
    bias = widened(layer.bias.unflatten(0, (-1, channels)), width, spare).flatten()
    return F.linear(tokens, weight, bias).unflatten(-1, (-1, width))


def to_qkv(
    layer: nn.Module, tokens: Tensor, channels: int, width: int | None = None, *, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, D) -> queries, keys and values, each (B, N, H, channels) or padded up to `width`, by one projection.

    Args:
        fused: where gradients are asked for, they are joined and summed in one pass (CUDA, Triton).
    """
    in_fp8 = rounds_by_row(layer)
    plain = (in_fp8 or type(layer) is nn.Linear) and layer.bias is not None
    if fused and plain and torch.is_grad_enabled() and can_run(tokens.device):
        from diffusion.models.kernels.qkv import project_qkv

        linear: Any = layer
        weight, bias = (part.to(product_dtype(tokens)) for part in (linear.weight, linear.bias))
        return project_qkv(tokens.to(weight.dtype), weight, bias, channels, width or channels, in_fp8=in_fp8)
    q, k, v = to_heads(layer, tokens, channels, width).chunk(3, dim=2)
    return q, k, v


def from_heads(layer: nn.Module, attended: Tensor, channels: int) -> Tensor:
    """(B, N, H, width) -> (B, N, D) by a projection of H * channels; what follows a head's channels is ignored."""
    extra = attended.shape[-1] - channels
    if not extra or type(layer) is not nn.Linear:
        return layer(attended[..., :channels].flatten(-2))
    weight = F.pad(layer.weight.unflatten(1, (-1, channels)), (0, extra)).flatten(1)
    return F.linear(attended.flatten(-2), weight, layer.bias)


def widened(values: Tensor, width: int | None, spare: float = 0.0) -> Tensor:
    """The last axis padded with zeros up to `width`; the first added channel is `spare`."""
    extra = (width or values.shape[-1]) - values.shape[-1]
    if extra <= 0:
        return values
    if spare:
        values, extra = torch.cat([values, torch.full_like(values[..., :1], spare)], dim=-1), extra - 1
    return F.pad(values, (0, extra))
