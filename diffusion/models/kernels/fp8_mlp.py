"""The feed-forward layer in FP8 with its GELU in Triton kernels: the FP8 of `fp8.py`, row by row.

Products are those of `FP8Linear`: forward pass and gradients of inputs in FP8, gradients of weights in the precision
of the tokens. What differs is that the GELU itself is never stored: forward, its pass rounds to FP8; backward, one
pass makes it again with the gradient of its input, which it rounds as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion.models.kernels.availability import HAS_TRITON
from diffusion.models.kernels.fp8 import gradient_by_row, product_by_row, rounded, rounded_gelu, rounded_with_sum

if HAS_TRITON:  # not while the compiler reads a block
    from diffusion.models.kernels.fp8_rows import rounded_gelu_gradients


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        dtype = tokens.dtype
        hidden = product_by_row(rounded(tokens, by_row=True), weight1, bias1, dtype, fast=True)
        ctx.save_for_backward(tokens, weight1, weight2, hidden)
        return product_by_row(rounded_gelu(hidden), weight2, bias2, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        tokens, weight1, weight2, hidden = ctx.saved_tensors
        dtype = tokens.dtype
        grad_rows, grad_scales, grad_bias2 = rounded_with_sum(grad)
        grad_activated = gradient_by_row((grad_rows, grad_scales), weight2, dtype)
        activated, grad_hidden, rows, scales, sums = rounded_gelu_gradients(grad_activated, hidden)
        return (
            gradient_by_row((rows, scales), weight1, dtype),
            grad_hidden.t() @ tokens,
            sums.sum(0).to(dtype),
            grad.t() @ activated,
            grad_bias2.to(dtype),
        )


def gelu_mlp(tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """fc2(gelu(fc1(tokens))) with FP8 products, (..., D) -> (..., D_out); all inputs have one precision."""
    with torch.autocast(tokens.device.type, enabled=False):
        rows: Tensor = _GeluMLP.apply(tokens.flatten(0, -2), weight1, bias1, weight2, bias2)
    return rows.unflatten(0, tokens.shape[:-1])
