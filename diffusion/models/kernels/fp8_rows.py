"""Rounding to FP8 by row in one pass, on a GPU; `fp8.quantise` is the same in plain torch.

Legend: M rows, K columns. Rounded values are e4m3, (M, K), and their scales (M, 1) float32, to multiply them by. Sums
are over a program's rows, (programs, K) float32: the rest of a sum is left to whoever needs it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from diffusion.models.kernels import fp8_triton as kernels

# As fastest on an H200.
_ROUND = {"num_warps": 4}
_SUM = {"ROWS": 16, "num_warps": 4}
_GELU = {"ROWS": 32, "num_warps": 16}
_JOIN = {"ROWS": 16, "num_warps": 4}


@custom_op("pixart::fp8_rows", mutates_args=())
def rounded_rows(values: Tensor, of_gelu: bool = False) -> tuple[Tensor, Tensor]:
    """(M, K) -> the same, or their GELU (tanh), rounded, and the scales."""
    (rows, width), (rounded, scales) = values.shape, _room(values)
    given = values.contiguous(), rounded, scales, width
    kernels.round_row[(rows,)](*given, OF_GELU=of_gelu, **_columns(width), **_ROUND)
    return rounded, scales


@rounded_rows.register_fake
def _(values: Tensor, of_gelu: bool = False) -> tuple[Tensor, Tensor]:
    return _room(values)


def rounded_and_summed(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, K) -> rounded, their scales, and sums."""
    found: tuple[Tensor, Tensor, Tensor] = _rounded_and_summed(values, _SUM["ROWS"])
    return found


# Rows of a program that shapes depend on are arguments of the operators: the compiler's cache knows those alone.


@custom_op("pixart::fp8_rows_summed", mutates_args=())
def _rounded_and_summed(values: Tensor, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    room = *_room(values), _sums(values, tile_rows)
    _run(kernels.round_and_sum, (values.contiguous(), *room), values.shape, {**_SUM, "ROWS": tile_rows})
    return room


@_rounded_and_summed.register_fake
def _(values: Tensor, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return *_room(values), _sums(values, tile_rows)


def rounded_gelu_gradients(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gelu(hidden), the gradient of `hidden`, both (M, K); that one rounded, its scales, and its sums."""
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _rounded_gelu_gradients(grad, hidden, _GELU["ROWS"])
    return found


@custom_op("pixart::fp8_gelu_backward", mutates_args=())
def _rounded_gelu_gradients(
    grad: Tensor, hidden: Tensor, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    room = _gelu_room(hidden, tile_rows)
    _run(kernels.round_gelu_gradients, (grad, hidden, *room), hidden.shape, {**_GELU, "ROWS": tile_rows})
    return room


@_rounded_gelu_gradients.register_fake
def _(grad: Tensor, hidden: Tensor, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gelu_room(hidden, tile_rows)


def _gelu_room(hidden: Tensor, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = _sums(hidden, tile_rows)
    return torch.empty_like(hidden), torch.empty_like(hidden), *_room(hidden), sums


def rounded_join(q: Tensor, k: Tensor, v: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `channels` of heads, three of (M, H, p), side by side: (M, 3 * H * channels); rounded, scales, sums."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _rounded_join(q, k, v, channels, _JOIN["ROWS"])
    return found


@custom_op("pixart::fp8_joined_gradients", mutates_args=())
def _rounded_join(
    q: Tensor, k: Tensor, v: Tensor, channels: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    room, (rows, heads, width) = _join_room(q, channels, tile_rows), q.shape
    tile = {**_JOIN, "ROWS": tile_rows, "CHANNELS": channels, "PADDED": width}
    _run(kernels.round_joined, (q, k, v, *room), (rows, heads * channels), tile)
    return room


@_rounded_join.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, channels: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _join_room(q, channels, tile_rows)


def _join_room(q: Tensor, channels: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    joined = q.new_empty(q.shape[0], 3 * q.shape[1] * channels)
    return joined, *_room(joined), _sums(joined, tile_rows)


def _run(kernel: Any, tensors: tuple[Tensor, ...], size: tuple[int, ...], tile: dict[str, int]) -> None:
    """A kernel of gradients, whose last tensor is for the sums."""
    kernel[(tensors[-1].shape[0],)](*tensors, *size, **_columns(size[1]), **tile)


def _columns(width: int) -> dict[str, int]:
    main = 1 << (width.bit_length() - 1)
    return {"MAIN": main, "REST": triton.next_power_of_2(max(1, width - main))}


def _room(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of rounded values and scales."""
    rounded = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    return rounded, values.new_empty(values.shape[0], 1, dtype=torch.float32)


def _sums(values: Tensor, tile_rows: int) -> Tensor:
    rows, width = values.shape
    return values.new_empty(-(-rows // tile_rows), width, dtype=torch.float32)
