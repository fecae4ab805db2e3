"""The feed-forward layer in FP8 with its GELU's rounding done by Triton kernels: the FP8 of `fp8.py`, row by row.

Products are those of `FP8Linear`: forward pass and gradients of inputs in FP8, gradients of weights in the precision
of the tokens. What differs is that values between the two layers are rounded to FP8 once, from float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from diffusion.models.kernels.elementwise import HAS_TRITON
from diffusion.models.kernels.fp8 import quantise, scaled_product

if HAS_TRITON:  # not while the compiler reads a block
    import triton

    from diffusion.models.kernels import fp8_triton as kernels

_FP8 = torch.float8_e4m3fn
# Of a program: warps, and rows of the backward pass, over which it sums; as fastest on an H200.
_FORWARD = {"num_warps": 4}
_BACKWARD = {"ROWS": 16, "num_warps": 8}


@custom_op("pixart::fp8_gelu", mutates_args=())
def _rounded_gelu(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> gelu(hidden) in FP8 and its scale, (M, 1) float32."""
    rows, width = hidden.shape
    rounded, scales = _room(hidden)
    kernels.gelu_forward[(rows,)](hidden, rounded, scales, width, **_halves(width), **_FORWARD)
    return rounded, scales


@_rounded_gelu.register_fake
def _(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return _room(hidden)


@custom_op("pixart::fp8_gelu_backward", mutates_args=())
def _gradients(grad_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gelu(hidden) and the gradient of `hidden`, both (M, K), that in FP8 and its scale, and parts of its sum over
    rows, (chunks, K)."""
    room, (rows, width) = _backward_room(hidden), hidden.shape
    kernels.gelu_backward[(room[-1].shape[0],)](grad_out, hidden, *room, rows, width, **_halves(width), **_BACKWARD)
    return room


@_gradients.register_fake
def _(grad_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_room(hidden)


def _halves(width: int) -> dict[str, int]:
    main = 1 << (width.bit_length() - 1)
    return {"MAIN": main, "REST": triton.next_power_of_2(max(1, width - main))}


def _backward_room(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = hidden.new_empty(-(-hidden.shape[0] // _BACKWARD["ROWS"]), hidden.shape[1], dtype=torch.float32)
    return torch.empty_like(hidden), torch.empty_like(hidden), *_room(hidden), parts


def _room(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, dtype=_FP8), values.new_empty(values.shape[0], 1, dtype=torch.float32)


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        rows = quantise(tokens, by_row=True)
        hidden = _product(rows, quantise(weight1, by_row=True), bias1, tokens.dtype, fast=True)
        ctx.save_for_backward(tokens, weight1, weight2, hidden)
        return _product(_rounded_gelu(hidden), quantise(weight2, by_row=True), bias2, tokens.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        tokens, weight1, weight2, hidden = ctx.saved_tensors
        dtype = tokens.dtype
        rows, columns = quantise(grad, by_row=True), quantise(weight2.t().contiguous(), by_row=True)
        grad_activated = _product(rows, columns, None, dtype, fast=False)
        activated, grad_hidden, rounded, scales, parts = _gradients(grad_activated, hidden)
        columns = quantise(weight1.t().contiguous(), by_row=True)
        return (
            _product((rounded, scales), columns, None, dtype, fast=False),
            grad_hidden.t() @ tokens,
            parts.sum(0).to(dtype),
            grad.t() @ activated,
            grad.sum(0, dtype=torch.float32).to(dtype),
        )


def _product(
    rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    return scaled_product(rows[0], columns[0], rows[1], columns[1], bias, dtype, fast=fast)


def gelu_mlp(tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """fc2(gelu(fc1(tokens))) with FP8 products, (..., D) -> (..., D_out); all inputs have one precision."""
    with torch.autocast(tokens.device.type, enabled=False):
        rows: Tensor = _GeluMLP.apply(tokens.flatten(0, -2), weight1, bias1, weight2, bias2)
    return rows.unflatten(0, tokens.shape[:-1])
