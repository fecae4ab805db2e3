"""Attention as two matrix products with a softmax between them, for training on CPUs that have products of bfloat16.

torch's own attention for CPUs makes gradients in bfloat16 by small tiles, slower than in float32 unless the processor
has tile instructions (AMX). Whole products are faster while the logits of a head fit into its caches.

Legend: B batch, H heads, N queries, M keys, c channels a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MOST_KEYS = 512  # with 1024 torch's attention is as fast compiled, and faster uncompiled


def suits(q: Tensor, k: Tensor) -> bool:
    """Whether this form is the faster one: half precision, gradients, few keys; q (B, H, N, c), k (B, H, M, c)."""
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    return is_half and torch.is_grad_enabled() and k.shape[-2] <= MOST_KEYS


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, as exact as torch's attention in the same precision.

    Args:
        q: (B, H, N, c). k, v: (B, H, M, c).
        mask: bool, True = keep, broadcasts to (B, H, N, M); None = every key.
    Returns:
        (B, H, N, c).
    """
    attended: Tensor = _Attention.apply(q, k, v, mask, scale)
    return attended


class _Attention(torch.autograd.Function):
    """Logits are made in float32, since a softmax magnifies their rounding; the other products in half precision."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        logits = scale * (q.float() @ k.float().transpose(-1, -2))  # (B, H, N, M)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        weights = logits.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, rounded = ctx.saved_tensors
        weights = rounded.float()
        by_weight = (grad @ v.transpose(-1, -2)).float()
        # The mean comes from the same rounded products, so that what they have in common cancels.
        mean = (weights * by_weight).sum(-1, keepdim=True)
        by_logit = (ctx.scale * weights * (by_weight - mean)).to(q.dtype)
        return by_logit @ k, by_logit.transpose(-1, -2) @ q, rounded.transpose(-1, -2) @ grad, None, None
