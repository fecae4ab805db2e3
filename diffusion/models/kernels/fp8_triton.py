"""Triton kernels for the GELU between FP8 products: one pass each way that also rounds to FP8, by row.

A scale by row needs the largest value of a row before the first is rounded. The compiler reads the widest activations
of a block twice for it; here a program holds its row in registers: MAIN columns, the power of two at or below the
width, and REST at or above what is left, so that few lanes idle.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from diffusion.models.kernels.fused import gelu_and_slope

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def _scale(main, rest):
    """That of a row, whose values are in two parts."""
    return tl.maximum(tl.maximum(tl.max(tl.abs(main), 0), tl.max(tl.abs(rest), 0)), 1e-12) / LARGEST


@triton.jit
def _store_rounded(values, scale, rounded, inside):
    values = tl.minimum(tl.maximum(values / scale, -LARGEST), LARGEST)
    tl.store(rounded, values.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def gelu_forward(hidden, rounded, scales, width, MAIN: tl.constexpr, REST: tl.constexpr):
    """rounded = gelu(hidden) in FP8; one row a program."""
    row, main, rest = tl.program_id(0).to(tl.int64), tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    hidden, rounded = hidden + row * width, rounded + row * width
    first, _ = gelu_and_slope(tl.load(hidden + main, mask=main < width, other=0.0).to(tl.float32))
    second, _ = gelu_and_slope(tl.load(hidden + rest, mask=rest < width, other=0.0).to(tl.float32))
    scale = _scale(first, second)
    tl.store(scales + row, scale)
    _store_rounded(first, scale, rounded + main, main < width)
    _store_rounded(second, scale, rounded + rest, rest < width)


@triton.jit
def _gradient(grad_out, hidden, out, grad_hidden, at, inside):
    """Of the GELU's input, at some columns of a row; stores it, and the GELU."""
    h = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    activated, slope = gelu_and_slope(h)
    tl.store(out + at, activated.to(out.dtype.element_ty), mask=inside)
    tl.store(grad_hidden + at, (dy * slope).to(grad_hidden.dtype.element_ty), mask=inside)
    return dy * slope


@triton.jit
def gelu_backward(
    grad_out, hidden, out, grad_hidden, rounded, scales, bias_parts, rows, width, ROWS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The GELU again, the gradient of its input, that in FP8, and the sums of that over the ROWS rows of a program."""
    chunk, main, rest = tl.program_id(0).to(tl.int64), tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    first_sum, second_sum = tl.zeros([MAIN], tl.float32), tl.zeros([REST], tl.float32)
    for index in range(ROWS):
        row = chunk * ROWS + index
        here = row < rows
        at, in_main, in_rest = row * width, (main < width) & here, (rest < width) & here
        first = _gradient(grad_out + at, hidden + at, out + at, grad_hidden + at, main, in_main)
        second = _gradient(grad_out + at, hidden + at, out + at, grad_hidden + at, rest, in_rest)
        scale = _scale(first, second)
        tl.store(scales + row, scale, mask=here)
        _store_rounded(first, scale, rounded + at + main, in_main)
        _store_rounded(second, scale, rounded + at + rest, in_rest)
        first_sum += first
        second_sum += second
    tl.store(bias_parts + chunk * width + main, first_sum, mask=main < width)
    tl.store(bias_parts + chunk * width + rest, second_sum, mask=rest < width)
