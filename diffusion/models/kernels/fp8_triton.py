"""Triton kernels that round to FP8 by row: of values, of their GELU, and of gradients together with the pass over them
that makes or joins them, and their sums over rows (the gradient of a bias).

A scale by row needs the largest value of a row before the first is rounded. The compiler reads a wide row twice for it;
here a program holds its row in registers: MAIN columns, the power of two at or below the width, and REST at or above
what is left, so that few lanes idle. Gradients are taken by ROWS rows a program, each asked for before the one ahead of
it is used, as its way is long; `sums` are (programs, width) float32.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from diffusion.models.kernels.gelu_triton import gelu_and_slope

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def padded(column, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Where a channel lies in a row whose heads are padded."""
    return column + column // CHANNELS * (PADDED - CHANNELS)


@triton.jit
def _row(values, row, end, stride, main, rest, width, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Both parts of a row, of which heads may be padded; zeros from row `end` on."""
    at = values + row * stride
    first = tl.load(at + padded(main, CHANNELS, PADDED), mask=(main < width) & (row < end), other=0.0)
    second = tl.load(at + padded(rest, CHANNELS, PADDED), mask=(rest < width) & (row < end), other=0.0)
    return first, second


@triton.jit
def _put(first, second, out, row, end, stride, main, rest, width):
    at = out + row * stride
    tl.store(at + main, first.to(out.dtype.element_ty), mask=(main < width) & (row < end))
    tl.store(at + rest, second.to(out.dtype.element_ty), mask=(rest < width) & (row < end))


@triton.jit
def _largest(first, second):
    return tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))


@triton.jit
def _factor(largest, scales, row, end):
    """What makes a row's largest value that of e4m3, to which a card's conversion limits what rounding leaves above it;
    writes down its inverse. (Quotients are many instructions.)"""
    scale = tl.maximum(largest, 1e-12) / LARGEST
    tl.store(scales + row, scale, mask=row < end)
    return 1.0 / scale


@triton.jit
def _round(first, second, rounded, scales, row, end, width, main, rest):
    """A row that one scale serves."""
    factor = _factor(_largest(first, second), scales, row, end)
    _put(first * factor, second * factor, rounded, row, end, width, main, rest, width)


@triton.jit
def _gelu(part, OF_GELU: tl.constexpr):
    if OF_GELU:
        part, _ = gelu_and_slope(part)
    return part


@triton.jit
def round_row(values, rounded, scales, width, OF_GELU: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """rounded * scales = values, or the GELU of them; one row a program."""
    row, main, rest = tl.program_id(0).to(tl.int64), tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    first, second = _row(values, row, row + 1, width, main, rest, width, 1, 1)
    first, second = _gelu(first.to(tl.float32), OF_GELU), _gelu(second.to(tl.float32), OF_GELU)
    _round(first, second, rounded, scales, row, row + 1, width, main, rest)


@triton.jit
def round_and_sum(
    values, rounded, scales, sums, rows, width, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr
):
    """rounded * scales = values, and their sums."""
    main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    row = tl.program_id(0).to(tl.int64) * ROWS
    end = tl.minimum(row + ROWS, rows)
    sum1, sum2 = tl.zeros([MAIN], tl.float32), tl.zeros([REST], tl.float32)
    next1, next2 = _row(values, row, end, width, main, rest, width, 1, 1)
    for _ in range(ROWS):
        first, second = next1.to(tl.float32), next2.to(tl.float32)
        next1, next2 = _row(values, row + 1, end, width, main, rest, width, 1, 1)
        sum1 += first
        sum2 += second
        _round(first, second, rounded, scales, row, end, width, main, rest)
        row += 1
    _put(sum1, sum2, sums, tl.program_id(0).to(tl.int64), tl.num_programs(0), width, main, rest, width)


@triton.jit
def round_gelu_gradients(
    grad_out, hidden, activated, grad_hidden, rounded, scales, sums, rows, width,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """gelu(h), the gradient of h, and that rounded; rounded * scales = grad_hidden, and its sums."""
    main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    row = tl.program_id(0).to(tl.int64) * ROWS
    end = tl.minimum(row + ROWS, rows)
    sum1, sum2 = tl.zeros([MAIN], tl.float32), tl.zeros([REST], tl.float32)
    next_h1, next_h2 = _row(hidden, row, end, width, main, rest, width, 1, 1)
    next_d1, next_d2 = _row(grad_out, row, end, width, main, rest, width, 1, 1)
    for _ in range(ROWS):
        h1, h2, first, second = next_h1, next_h2, next_d1.to(tl.float32), next_d2.to(tl.float32)
        next_h1, next_h2 = _row(hidden, row + 1, end, width, main, rest, width, 1, 1)
        next_d1, next_d2 = _row(grad_out, row + 1, end, width, main, rest, width, 1, 1)
        active1, slope1 = gelu_and_slope(h1.to(tl.float32))
        active2, slope2 = gelu_and_slope(h2.to(tl.float32))
        first *= slope1
        second *= slope2
        sum1 += first
        sum2 += second
        _put(active1, active2, activated, row, end, width, main, rest, width)
        _put(first, second, grad_hidden, row, end, width, main, rest, width)
        _round(first, second, rounded, scales, row, end, width, main, rest)
        row += 1
    _put(sum1, sum2, sums, tl.program_id(0).to(tl.int64), tl.num_programs(0), width, main, rest, width)


@triton.jit
def round_joined(
    q, k, v, joined, rounded, scales, sums, rows, width, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rows of q, k and v side by side, (rows, 3 * width); rounded * scales = joined, and their sums."""
    main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    row = tl.program_id(0).to(tl.int64) * ROWS
    end, stride = tl.minimum(row + ROWS, rows), padded(width, CHANNELS, PADDED)
    q_sum1, k_sum1, v_sum1 = tl.zeros([MAIN], tl.float32), tl.zeros([MAIN], tl.float32), tl.zeros([MAIN], tl.float32)
    q_sum2, k_sum2, v_sum2 = tl.zeros([REST], tl.float32), tl.zeros([REST], tl.float32), tl.zeros([REST], tl.float32)
    next_q1, next_q2 = _row(q, row, end, stride, main, rest, width, CHANNELS, PADDED)
    next_k1, next_k2 = _row(k, row, end, stride, main, rest, width, CHANNELS, PADDED)
    next_v1, next_v2 = _row(v, row, end, stride, main, rest, width, CHANNELS, PADDED)
    for _ in range(ROWS):
        q1, k1, v1 = next_q1.to(tl.float32), next_k1.to(tl.float32), next_v1.to(tl.float32)
        q2, k2, v2 = next_q2.to(tl.float32), next_k2.to(tl.float32), next_v2.to(tl.float32)
        next_q1, next_q2 = _row(q, row + 1, end, stride, main, rest, width, CHANNELS, PADDED)
        next_k1, next_k2 = _row(k, row + 1, end, stride, main, rest, width, CHANNELS, PADDED)
        next_v1, next_v2 = _row(v, row + 1, end, stride, main, rest, width, CHANNELS, PADDED)
        q_sum1, k_sum1, v_sum1 = q_sum1 + q1, k_sum1 + k1, v_sum1 + v1
        q_sum2, k_sum2, v_sum2 = q_sum2 + q2, k_sum2 + k2, v_sum2 + v2
        _put(q1, q2, joined, row, end, 3 * width, main, rest, width)
        _put(k1, k2, joined + width, row, end, 3 * width, main, rest, width)
        _put(v1, v2, joined + 2 * width, row, end, 3 * width, main, rest, width)
        largest = tl.maximum(_largest(q1, q2), tl.maximum(_largest(k1, k2), _largest(v1, v2)))
        factor = _factor(largest, scales, row, end)
        _put(q1 * factor, q2 * factor, rounded, row, end, 3 * width, main, rest, width)
        _put(k1 * factor, k2 * factor, rounded + width, row, end, 3 * width, main, rest, width)
        _put(v1 * factor, v2 * factor, rounded + 2 * width, row, end, 3 * width, main, rest, width)
        row += 1
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    _put(q_sum1, q_sum2, sums, program, programs, 3 * width, main, rest, width)
    _put(k_sum1, k_sum2, sums + width, program, programs, 3 * width, main, rest, width)
    _put(v_sum1, v_sum2, sums + 2 * width, program, programs, 3 * width, main, rest, width)
