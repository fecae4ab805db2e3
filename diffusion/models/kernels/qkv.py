"""One projection to queries, keys and values, whose backward pass joins their gradients and sums them up in one pass.

Without it they are copied side by side for the products, and then read again for the bias. Heads may be wider in the
attention than in the weights: they are padded after the product, and the padding's gradients are never read, so that
the products stay as narrow as the weights. In FP8 the same pass rounds what it has joined.

Legend: B batch, N tokens, D width, H heads, c channels a head, p channels of a padded head.
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

from diffusion.models.kernels.fp8 import gradient_by_row, product_by_row, rounded
from diffusion.models.kernels.fp8_rows import rounded_join
from diffusion.models.kernels.fp8_triton import padded
from diffusion.models.kernels.heads import widened

_JOIN = {"ROWS": 64, "BLOCK": 128, "num_warps": 4}


@triton.jit
def _join(
    q, k, v, joined, sums, rows, width,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    stride = padded(width, CHANNELS, PADDED)
    at = row[:, None] * stride + padded(column, CHANNELS, PADDED)[None, :]
    values = tl.load(part + first * stride + at, mask=inside, other=0.0)
    column += third * width
    tl.store(joined + first * 3 * width + row[:, None] * 3 * width + column[None, :], values, mask=inside)
    at = tl.program_id(0).to(tl.int64) * 3 * width + column
    tl.store(sums + at, tl.sum(values.to(tl.float32), 0), mask=column < (third + 1) * width)


@custom_op("pixart::joined_gradients", mutates_args=())
def _joined(q: Tensor, k: Tensor, v: Tensor, channels: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Three of (rows, H, p) -> (rows, 3 * H * c), and the sums of each tile of rows, (tiles, 3 * H * c) float32."""
    (joined, sums), (rows, heads, padded_to) = _room(q, channels, tile_rows), q.shape
    grid = (sums.shape[0], 3 * triton.cdiv(heads * channels, _JOIN["BLOCK"]))
    tile = {**_JOIN, "ROWS": tile_rows, "CHANNELS": channels, "PADDED": padded_to}
    _join[grid](q, k, v, joined, sums, rows, heads * channels, **tile)
    return joined, sums


@_joined.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, channels: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    return _room(q, channels, tile_rows)


def _room(q: Tensor, channels: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    rows, width = q.shape[0], 3 * q.shape[1] * channels
    return q.new_empty(rows, width), q.new_empty(-(-rows // tile_rows), width, dtype=torch.float32)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, channels: int, width: int, in_fp8: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tokens, weight)
        ctx.channels, ctx.in_fp8, ctx.bias_dtype = channels, in_fp8, bias.dtype
        if in_fp8:
            rows = rounded(tokens.flatten(0, 1), by_row=True)
            out = product_by_row(rows, weight, bias, tokens.dtype, fast=True).unflatten(0, tokens.shape[:2])
        else:
            out = F.linear(tokens, weight, bias)
        parts = out.unflatten(-1, (3, -1, channels)).unbind(2)
        return tuple([widened(part, width) for part in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        q, k, v = [gradient.contiguous().flatten(0, 1) for gradient in gradients]
        if ctx.in_fp8:
            joined, rows, scales, sums = rounded_join(q, k, v, ctx.channels)
            grad_tokens = gradient_by_row((rows, scales), weight, tokens.dtype)
        else:
            joined, sums = _joined(q, k, v, ctx.channels, _JOIN["ROWS"])
            grad_tokens = joined @ weight
        grad_bias = sums.sum(0).to(ctx.bias_dtype)
        return grad_tokens.view_as(tokens), joined.t() @ tokens.flatten(0, 1), grad_bias, None, None, None


def project_qkv(
    tokens: Tensor, weight: Tensor, bias: Tensor, channels: int, width: int, *, in_fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, D), (3 * H * c, D), (3 * H * c,), of one precision -> q, k, v, each (B, N, H, p).

    Args:
        channels: c. width: p, c or more.
        in_fp8: products as those of `FP8Linear` by row.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        q, k, v = _Project.apply(tokens, weight, bias, channels, width, in_fp8)
    return q, k, v
