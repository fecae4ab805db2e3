"""Triton kernels for the GELU between FP8 products: one pass each way that also rounds to FP8, by row.

A scale by row needs the largest value of a row before the first is rounded. The compiler reads the widest activations
of a block twice for it; here a program holds its row in registers.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from diffusion.models.kernels.fused import gelu_and_slope

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def _store_rounded(values, inside, row, at, rounded, scales):
    """Values of one row in FP8, and the scale that they are to be multiplied by."""
    scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    values = tl.minimum(tl.maximum(values / scale, -LARGEST), LARGEST)
    tl.store(rounded + at, values.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def gelu_forward(hidden, rounded, scales, width, BLOCK: tl.constexpr):
    """rounded = gelu(hidden) in FP8; one row a program."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = column < width, row * width + column
    activated, _ = gelu_and_slope(tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32))
    _store_rounded(activated, inside, row, at, rounded, scales)


@triton.jit
def gelu_backward(
    grad_out, hidden, out, grad_hidden, rounded, scales, bias_parts, rows, width, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The GELU again, the gradient of its input, that in FP8, and the sums of that over the ROWS rows of a program."""
    chunk, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for index in range(ROWS):
        row = chunk * ROWS + index
        if row < rows:
            inside, at = column < width, row * width + column
            h = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
            activated, slope = gelu_and_slope(h)
            dh = dy * slope
            tl.store(out + at, activated.to(out.dtype.element_ty), mask=inside)
            tl.store(grad_hidden + at, dh.to(grad_hidden.dtype.element_ty), mask=inside)
            _store_rounded(dh, inside, row, at, rounded, scales)
            bias_sum += dh
    tl.store(bias_parts + chunk * width + column, bias_sum, mask=column < width)
