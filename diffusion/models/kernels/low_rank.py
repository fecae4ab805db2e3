"""Linear layers whose weights have low-rank factors beside them that train, by one product each way.

The factors' own products are small, but read and write all activations again, and a network of 280 such layers spends
as much time on them as a full training step on the gradients of its weights. Here the weights are summed up first,
S = W + s U D, so that y = x S^T + b and dx = dy S; the factors' gradients, dD = s (dy U)^T x and dU = s dy^T (x D^T),
take two further passes (LoRA: arXiv:2106.09685, Eq. 3).

In bfloat16 the factors' early, small changes would be lost when S is rounded to nearest: W itself is a bfloat16. S is
rounded up or down by chance, so that on average the whole change is seen. The chance is a fixed draw for each weight,
the same in every step, and nothing is rounded where nothing is changed: training starts exactly at the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from diffusion.models.kernels.availability import HAS_TRITON, INTERPRETED, can_run

if HAS_TRITON:  # not while the compiler reads a block
    import triton

    from diffusion.models.kernels import low_rank_triton as kernels

_MOST_COLUMNS = 64  # of all parts' factors, padded; more do not fit into the shared memory of small cards
_FEWEST_ROWS = 64  # of activations; below, the factors' own products are cheaper than a sum of weights

# What the kernels divide their work by, as it was fastest on an H200 at the shapes of XL/2 with rank 16.
_SUM = {"OUT": 32, "IN": 64, "num_warps": 4}
_PROJECT = {"ROWS": 32, "BLOCK": 128, "num_warps": 4, "num_stages": 3}
_PROJECT_ON_FEW = {**_PROJECT, "num_stages": 4}  # of at most 16 columns, which leave shared memory for more stages
_PROJECT_MANY_ON_FEW = {**_PROJECT_ON_FEW, "ROWS": 64}  # likewise, when 4096 rows or more keep the card busy
_GRADIENTS = {"ROWS": 64, "BLOCK": 64, "num_warps": 4}
_PROJECTING, _MOST_SHARES = 264, 2  # programs of `project` that shares of the width make up for, and most shares
_PROGRAMS = 396  # of `gradients`, wanted at least: three for each multiprocessor
_FEWEST_SUMMED = 256  # rows of such a program


class LowRank(NamedTuple):
    """A layer, or a part of one: y = x (weight + scale * up down)^T + bias.

    Args:
        weight: (out, in). bias: (out,). down: (rank, in). up: (out, rank).
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float


def can_sum(device: torch.device, parts: Sequence[LowRank]) -> bool:
    """Whether `summed_linear` computes these parts: alike, with factors that train, in bfloat16, on a GPU."""
    if not (can_run(device) and torch.is_grad_enabled()):
        return False
    first, kind = parts[0], device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else first.weight.dtype
    if dtype != torch.bfloat16:
        return False
    for part in parts:
        alike = part.weight.shape == first.weight.shape and part.down.shape == first.down.shape
        if not (alike and part.down.requires_grad and part.scale == first.scale):
            return False
        if part.weight.dtype not in (torch.bfloat16, torch.float32) or (part.bias is None) != (first.bias is None):
            return False
    return _columns(len(parts), first.down.shape[0]) <= _MOST_COLUMNS


def takes_sum(x: Tensor, parts: Sequence[LowRank]) -> bool:
    """Whether `summed_linear` is the way to compute these parts of x (..., in)."""
    return can_sum(x.device, parts) and x.numel() >= _FEWEST_ROWS * x.shape[-1]


def summed_weights(groups: Sequence[Sequence[LowRank]]) -> list[Tensor]:
    """The sums of the parts of each group, (out of all its parts, in), in bfloat16; all by one launch."""
    parts = [part for group in groups for part in group]
    downs, ups = [part.down.detach() for part in parts], [part.up.detach() for part in parts]
    flat = _summed_weights([part.weight.detach() for part in parts], downs, ups, [part.scale for part in parts])
    pieces = flat.split([sum(part.weight.numel() for part in group) for group in groups])
    return [piece.view(-1, group[0].weight.shape[1]) for piece, group in zip(pieces, groups)]


def summed_linear(x: Tensor, parts: Sequence[LowRank], total: Tensor | None = None) -> Tensor:
    """The outputs of parts that read the same x, one after another, in bfloat16; gradients of x and factors alone.

    Args:
        x: (..., in).
        total: the parts' `summed_weights`; None = summed up here.
    Returns:
        (..., out of all parts).
    """
    total = summed_weights([parts])[0] if total is None else total
    bias = None if parts[0].bias is None else _joined([part.bias for part in parts]).to(torch.bfloat16)
    down, up = _joined([part.down for part in parts]), _joined([part.up for part in parts])
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _SummedLinear.apply(x.to(torch.bfloat16), bias, down, up, parts[0].scale, len(parts), total)
    return out


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, parts: int, total: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, total, down, up)
        ctx.scale, ctx.parts = scale, parts
        return F.linear(x, total, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, total, down, up = ctx.saved_tensors
        rows, tokens = _as_rows(grad), _as_rows(x)
        grad_x = (rows @ total).view_as(x) if ctx.needs_input_grad[0] else None
        splits = _splits(len(rows), tokens.shape[1], up.shape[0] // ctx.parts, ctx.parts)
        sums = _gradients(tokens, rows, down, up, ctx.parts, ctx.scale, splits)
        both = sums.sum(0) if splits > 1 else sums[0]
        grad_up, grad_down = both.split([up.numel(), down.numel()])
        factors = grad_down.view_as(down).to(down.dtype), grad_up.view_as(up).to(up.dtype)
        return grad_x, None, *factors, None, None, None


@custom_op("pixart::summed_weights", mutates_args=())
def _summed_weights(
    weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """One after another: (out, in) of each layer, whose factors are down (rank, in) and up (out, rank)."""
    shapes = tuple((*weight.shape, len(down), _padded(len(down))) for weight, down in zip(weights, downs))
    out = _room(weights)
    tiles = sum(triton.cdiv(rows, _SUM["OUT"]) * triton.cdiv(width, _SUM["IN"]) for rows, width, *_ in shapes)
    given = [tuple(tensor.contiguous() for tensor in tensors) for tensors in (weights, downs, ups)]
    kernels.sum_weights[(tiles,)](*given, tuple(scales), out, SHAPES=shapes, **_SUM)
    return out


@_summed_weights.register_fake
def _(weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    return _room(weights)


def _room(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].new_empty(sum(weight.numel() for weight in weights), dtype=torch.bfloat16)


@custom_op("pixart::low_rank_gradients", mutates_args=())
def _gradients(x: Tensor, grad: Tensor, down: Tensor, up: Tensor, parts: int, scale: float, splits: int) -> Tensor:
    """Of `up`, and behind it of `down`, in a row of float32 for each of so many splits of all rows, to be summed up.

    x (rows, in), grad (rows, out of all parts). What the shape depends on is an argument: the compiler's cache knows
    arguments alone.
    """
    (rows, inputs), (outputs, rank) = x.shape, up.shape
    outputs //= parts
    counts = (inputs, outputs, parts, rank)
    shape = {"PARTS": triton.next_power_of_2(parts), "RANK": _padded(rank), "WIDE": INTERPRETED}
    columns = _columns(parts, rank)
    tile = _PROJECT if columns > 16 else _PROJECT_MANY_ON_FEW if rows >= 4096 else _PROJECT_ON_FEW
    programs = triton.cdiv(rows, tile["ROWS"]) * (1 + parts)
    shares = max(1, min(_MOST_SHARES, _PROJECTING // programs))
    below, above = (x.new_empty(shares, rows, columns, dtype=torch.float32) for _ in range(2))
    kernels.project[(triton.cdiv(rows, tile["ROWS"]), 1 + parts, shares)](
        x, grad, down.contiguous(), up.contiguous(), below, above, rows, *counts, scale, x.stride(0), grad.stride(0),
        **shape, **tile,
    )  # fmt: skip
    sums = x.new_empty(splits, up.numel() + down.numel(), dtype=torch.float32)
    tiles = _tiles(inputs, outputs, parts)
    kernels.gradients[(tiles, splits)](
        x, grad, below, above, sums, rows, *counts, triton.cdiv(rows, splits), x.stride(0), grad.stride(0), **shape,
        SHARES=shares, **_GRADIENTS,
    )  # fmt: skip
    return sums


@_gradients.register_fake
def _(x: Tensor, grad: Tensor, down: Tensor, up: Tensor, parts: int, scale: float, splits: int) -> Tensor:
    return x.new_empty(splits, up.numel() + down.numel(), dtype=torch.float32)


def _tiles(inputs: int, outputs: int, parts: int) -> int:
    """Programs of `gradients` that all outputs and inputs make."""
    block = _GRADIENTS["BLOCK"]
    return parts * -(-outputs // block) + -(-inputs // block)


def _splits(rows: int, inputs: int, outputs: int, parts: int) -> int:
    """Sums that `gradients` makes over a part of the rows each."""
    return max(1, min(-(-_PROGRAMS // _tiles(inputs, outputs, parts)), rows // _FEWEST_SUMMED))


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _columns(parts: int, rank: int) -> int:
    return (1 << (parts - 1).bit_length()) * _padded(rank)


def _joined(parts: Sequence[Any]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _as_rows(tensor: Tensor) -> Tensor:
    tensor = tensor.flatten(0, -2)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
