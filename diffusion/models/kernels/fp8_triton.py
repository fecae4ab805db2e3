"""Triton kernels that round to FP8 by row, of values or of their GELU.

A scale by row needs the largest value of a row before the first is rounded. The compiler reads a wide row twice for it;
here a program holds its row in registers: MAIN columns, the power of two at or below the width, and REST at or above
what is left, so that few lanes idle.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from diffusion.models.kernels.gelu_triton import gelu_and_slope

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def _load(values, column, width, OF_GELU: tl.constexpr):
    part = tl.load(values + column, mask=column < width, other=0.0).to(tl.float32)
    if OF_GELU:
        part, _ = gelu_and_slope(part)
    return part


@triton.jit
def _store(part, scale, rounded, column, width):
    part = tl.minimum(tl.maximum(part / scale, -LARGEST), LARGEST)
    tl.store(rounded + column, part.to(rounded.dtype.element_ty), mask=column < width)


@triton.jit
def round_row(values, rounded, scales, width, OF_GELU: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """rounded * scales = values, or the GELU of them; one row a program."""
    row, main, rest = tl.program_id(0).to(tl.int64), tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    first = _load(values + row * width, main, width, OF_GELU)
    second = _load(values + row * width, rest, width, OF_GELU)
    largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
    scale = tl.maximum(largest, 1e-12) / LARGEST
    tl.store(scales + row, scale)
    _store(first, scale, rounded + row * width, main, width)
    _store(second, scale, rounded + row * width, rest, width)
