"""Rounding to FP8 by row in one pass, on a GPU; `fp8.quantise` is the same in plain torch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from diffusion.models.kernels import fp8_triton as kernels

MOST_COLUMNS = 8192  # that fit into the registers of a program
_ROUND = {"num_warps": 4}  # as fastest on an H200


@custom_op("pixart::fp8_rows", mutates_args=())
def rounded_rows(values: Tensor, of_gelu: bool = False) -> tuple[Tensor, Tensor]:
    """(M, K) -> the same, or their GELU (tanh), in FP8 (e4m3), and the scale, (M, 1) float32, to multiply it by."""
    (rows, width), (rounded, scales) = values.shape, _room(values)
    main = 1 << (width.bit_length() - 1)
    rest = triton.next_power_of_2(max(1, width - main))
    kernels.round_row[(rows,)](
        values.contiguous(), rounded, scales, width, OF_GELU=of_gelu, MAIN=main, REST=rest, **_ROUND
    )
    return rounded, scales


@rounded_rows.register_fake
def _(values: Tensor, of_gelu: bool = False) -> tuple[Tensor, Tensor]:
    return _room(values)


def _room(values: Tensor) -> tuple[Tensor, Tensor]:
    rounded = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    return rounded, values.new_empty(values.shape[0], 1, dtype=torch.float32)
