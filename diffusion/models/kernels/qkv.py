"""One projection to queries, keys and values, whose backward pass joins their gradients and sums them up in one pass.

Without it they are copied side by side for the products, and then read again for the bias.

Legend: B batch, N tokens, D width, H heads, c channels a head.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

_JOIN = {"ROWS": 64, "BLOCK": 128, "num_warps": 4}


@triton.jit
def _join(q, k, v, joined, sums, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of one of the three: into its third of `joined`, (rows, 3 * width), and its sums into those of tiles."""
    tiles = tl.cdiv(width, BLOCK)
    third, column = tl.program_id(1) // tiles, tl.program_id(1) % tiles * BLOCK + tl.arange(0, BLOCK)
    if third == 0:
        part = q
    elif third == 1:
        part = k
    else:
        part = v
    first, row = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    inside = (first + row < rows)[:, None] & (column < width)[None, :]
    values = tl.load(part + first * width + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    column += third * width
    tl.store(joined + first * 3 * width + row[:, None] * 3 * width + column[None, :], values, mask=inside)
    at = tl.program_id(0).to(tl.int64) * 3 * width + column
    tl.store(sums + at, tl.sum(values.to(tl.float32), 0), mask=column < (third + 1) * width)


@custom_op("pixart::joined_gradients", mutates_args=())
def _joined(q: Tensor, k: Tensor, v: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Three of (rows, D) -> (rows, 3 * D), and the sums of each tile of rows, (tiles, 3 * D) float32."""
    joined, sums = _room(q, tile_rows)
    grid = (sums.shape[0], 3 * triton.cdiv(q.shape[1], _JOIN["BLOCK"]))
    _join[grid](q, k, v, joined, sums, *q.shape, **{**_JOIN, "ROWS": tile_rows})
    return joined, sums


@_joined.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    return _room(q, tile_rows)


def _room(q: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    rows, width = q.shape
    return q.new_empty(rows, 3 * width), q.new_empty(-(-rows // tile_rows), 3 * width, dtype=torch.float32)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, channels: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tokens, weight)
        ctx.bias_dtype = bias.dtype
        return tuple(F.linear(tokens, weight, bias).unflatten(-1, (3, -1, channels)).unbind(2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        q, k, v = [gradient.contiguous().flatten(0, 1).flatten(1) for gradient in gradients]
        joined, sums = _joined(q, k, v, _JOIN["ROWS"])
        grad_bias = sums.sum(0).to(ctx.bias_dtype)
        return (joined @ weight).view_as(tokens), joined.t() @ tokens.flatten(0, 1), grad_bias, None


def project_qkv(tokens: Tensor, weight: Tensor, bias: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, D), (3 * D, D), (3 * D,), of one precision -> q, k, v, each (B, N, H, c)."""
    with torch.autocast(tokens.device.type, enabled=False):
        q, k, v = _Project.apply(tokens, weight, bias, channels)
    return q, k, v
