"""Triton kernels of `few_keys`: one pass forward, and two kernels backward or, with all keys in one program, one.

A head's channels are read as two parts that products can have, a LOW one and, where HIGH is not 0, another. With WIDE
all is computed in float32, for Triton's interpreter, which multiplies no bfloat16. The legend is that of `few_keys`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _head_of(start, pair, heads, of_sample, of_head):
    return start + pair // heads * of_sample + pair % heads * of_head


@triton.jit
def _columns(start, row, stride, num_rows, column, channels, WIDE: tl.constexpr):
    inside = (row < num_rows)[:, None] & (column < channels)[None, :]
    values = tl.load(start + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
    return values.to(tl.float32) if WIDE else values


@triton.jit
def _read(
    start, row, stride, num_rows, channels, LOW: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Both parts of some rows of a head; without a high one, the low one stands in its place and is not read."""
    low = _columns(start, row, stride, num_rows, tl.arange(0, LOW), channels, WIDE)
    if HIGH:
        high = _columns(start, row, stride, num_rows, LOW + tl.arange(0, HIGH), channels, WIDE)
    else:
        high = low
    return low, high


@triton.jit
def _write_columns(start, values, row, stride, num_rows, column, channels):
    inside = (row < num_rows)[:, None] & (column < channels)[None, :]
    tl.store(start + row[:, None] * stride + column[None, :], values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _write(start, low, high, row, stride, num_rows, channels, LOW: tl.constexpr, HIGH: tl.constexpr):
    _write_columns(start, low, row, stride, num_rows, tl.arange(0, LOW), channels)
    if HIGH:
        _write_columns(start, high, row, stride, num_rows, LOW + tl.arange(0, HIGH), channels)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """a b^T over both parts."""
    scores = _product(a_low, tl.trans(b_low))
    if HIGH:
        scores += _product(a_high, tl.trans(b_high))
    return scores


@triton.jit
def _row_sums(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """rowsum(a b) over both parts, in float32."""
    sums = tl.sum(a_low.to(tl.float32) * b_low, 1)
    if HIGH:
        sums += tl.sum(a_high.to(tl.float32) * b_high, 1)
    return sums


@triton.jit
def _add(low, high, weights, by_low, by_high, HIGH: tl.constexpr):
    """low + weights by_low, and the same of the high part."""
    low += _product(weights, by_low)
    if HIGH:
        high += _product(weights, by_high)
    return low, high


@triton.jit
def _zeros(ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    low = tl.zeros([ROWS, LOW], tl.float32)
    if HIGH:
        high = tl.zeros([ROWS, HIGH], tl.float32)
    else:
        high = low
    return low, high


@triton.jit
def _factor(values, like, WIDE: tl.constexpr):
    """As the factor of a product of tokens."""
    return values if WIDE else values.to(like.dtype.element_ty)


@triton.jit
def _seen(keep, sample, key, keys, HAS_KEEP: tl.constexpr):
    seen = key < keys
    if HAS_KEEP:
        seen = seen & (tl.load(keep + sample * keys + key, mask=seen, other=0) != 0)
    return seen


@triton.jit
def forward(
    q, k, v, keep, out, lse, heads, queries, keys, channels, scale2,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, o_sample, o_row, o_head,
    HAS_KEEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out, and the logarithm (base 2) of each row's sum of exponentials; scale2 = scale / ln 2."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = _head_of(k, pair, heads, k_sample, k_head)
    v = _head_of(v, pair, heads, v_sample, v_head)
    q_low, q_high = _read(
        _head_of(q, pair, heads, q_sample, q_head), row, q_row, queries, channels, LOW, HIGH, WIDE
    )  # fmt: skip
    sum_low, sum_high = _zeros(ROWS, LOW, HIGH)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a block without a key to keep changes nothing
    total = tl.zeros([ROWS], tl.float32)
    for step in range(tl.cdiv(keys, KEYS)):
        key = step * KEYS + tl.arange(0, KEYS)
        k_low, k_high = _read(k, key, k_row, keys, channels, LOW, HIGH, WIDE)
        seen = _seen(keep, pair // heads, key, keys, HAS_KEEP)
        logits = _scores(q_low, q_high, k_low, k_high, HIGH)
        logits = tl.where(seen[None, :], logits * scale2, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights, shrunk = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
        top, total = higher, total * shrunk + tl.sum(weights, 1)
        v_low, v_high = _read(v, key, v_row, keys, channels, LOW, HIGH, WIDE)
        sum_low, sum_high = _add(
            sum_low * shrunk[:, None], sum_high * shrunk[:, None], _factor(weights, q, WIDE), v_low, v_high, HIGH
        )
    out = _head_of(out, pair, heads, o_sample, o_head)
    _write(out, sum_low / total[:, None], sum_high / total[:, None], row, o_row, queries, channels, LOW, HIGH)
    tl.store(lse + pair * queries + row, top + tl.log2(total), mask=row < queries)


@triton.jit
def backward_queries(
    q, k, v, keep, out, grad, lse, delta, dq, heads, queries, keys, channels, scale, scale2,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, o_sample, o_row, o_head,
    g_sample, g_row, g_head, dq_sample, dq_row, dq_head,
    HAS_KEEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dq and D of some queries, over all keys."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = _head_of(k, pair, heads, k_sample, k_head)
    v = _head_of(v, pair, heads, v_sample, v_head)
    out = _head_of(out, pair, heads, o_sample, o_head)
    grad = _head_of(grad, pair, heads, g_sample, g_head)
    q_low, q_high = _read(
        _head_of(q, pair, heads, q_sample, q_head), row, q_row, queries, channels, LOW, HIGH, WIDE
    )  # fmt: skip
    g_low, g_high = _read(grad, row, g_row, queries, channels, LOW, HIGH, WIDE)
    o_low, o_high = _read(out, row, o_row, queries, channels, LOW, HIGH, True)
    mean = _row_sums(g_low, g_high, o_low, o_high, HIGH)
    dq_low, dq_high = _zeros(ROWS, LOW, HIGH)
    base = tl.load(lse + pair * queries + row, mask=row < queries, other=0.0)
    for step in range(tl.cdiv(keys, KEYS)):
        key = step * KEYS + tl.arange(0, KEYS)
        k_low, k_high = _read(k, key, k_row, keys, channels, LOW, HIGH, WIDE)
        v_low, v_high = _read(v, key, v_row, keys, channels, LOW, HIGH, WIDE)
        logits = _scores(q_low, q_high, k_low, k_high, HIGH)
        by_weight = _scores(g_low, g_high, v_low, v_high, HIGH)
        seen = _seen(keep, pair // heads, key, keys, HAS_KEEP)
        weights = tl.where(seen[None, :], tl.exp2(logits * scale2 - base[:, None]), 0.0)
        by_logit = _factor(weights * (by_weight - mean[:, None]), q, WIDE)
        dq_low, dq_high = _add(dq_low, dq_high, by_logit, k_low, k_high, HIGH)
    dq = _head_of(dq, pair, heads, dq_sample, dq_head)
    _write(dq, dq_low * scale, dq_high * scale, row, dq_row, queries, channels, LOW, HIGH)
    tl.store(delta + pair * queries + row, mean, mask=row < queries)


@triton.jit
def backward_keys(
    q, k, v, keep, out, grad, lse, delta, dq, dk, dv, heads, queries, keys, channels, scale, scale2, span,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, o_sample, o_row, o_head,
    g_sample, g_row, g_head, dq_sample, dq_row, dq_head, dk_part, dk_sample, dk_row, dk_head,
    dv_part, dv_sample, dv_row, dv_head,
    ALONE: tl.constexpr, HAS_KEEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of some keys, over `span` queries; ALONE: of all keys, so that dq is made here too, and D."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    q = _head_of(q, pair, heads, q_sample, q_head)
    k = _head_of(k, pair, heads, k_sample, k_head)
    v = _head_of(v, pair, heads, v_sample, v_head)
    out = _head_of(out, pair, heads, o_sample, o_head)
    grad = _head_of(grad, pair, heads, g_sample, g_head)
    dq = _head_of(dq, pair, heads, dq_sample, dq_head)
    k_low, k_high = _read(k, key, k_row, keys, channels, LOW, HIGH, WIDE)
    v_low, v_high = _read(v, key, v_row, keys, channels, LOW, HIGH, WIDE)
    dk_low, dk_high = _zeros(KEYS, LOW, HIGH)
    dv_low, dv_high = _zeros(KEYS, LOW, HIGH)
    seen = _seen(keep, pair // heads, key, keys, HAS_KEEP)
    for step in range(tl.cdiv(span, ROWS)):
        row = part * span + step * ROWS + tl.arange(0, ROWS)
        q_low, q_high = _read(q, row, q_row, queries, channels, LOW, HIGH, WIDE)
        g_low, g_high = _read(grad, row, g_row, queries, channels, LOW, HIGH, WIDE)
        logits = _scores(k_low, k_high, q_low, q_high, HIGH)  # (KEYS, ROWS), as all here
        by_weight = _scores(v_low, v_high, g_low, g_high, HIGH)
        if ALONE:
            o_low, o_high = _read(out, row, o_row, queries, channels, LOW, HIGH, True)
            mean = _row_sums(g_low, g_high, o_low, o_high, HIGH)
        else:
            mean = tl.load(delta + pair * queries + row, mask=row < queries, other=0.0)
        base = tl.load(lse + pair * queries + row, mask=row < queries, other=0.0)
        inside = seen[:, None] & (row < queries)[None, :]
        weights = tl.where(inside, tl.exp2(logits * scale2 - base[None, :]), 0.0)
        by_logit = _factor(weights * (by_weight - mean[None, :]), q, WIDE)
        dv_low, dv_high = _add(dv_low, dv_high, _factor(weights, q, WIDE), g_low, g_high, HIGH)
        dk_low, dk_high = _add(dk_low, dk_high, by_logit, q_low, q_high, HIGH)
        if ALONE:
            dq_low, dq_high = _zeros(ROWS, LOW, HIGH)
            dq_low, dq_high = _add(dq_low, dq_high, tl.trans(by_logit), k_low, k_high, HIGH)
            _write(dq, dq_low * scale, dq_high * scale, row, dq_row, queries, channels, LOW, HIGH)
    dk = _head_of(dk + part * dk_part, pair, heads, dk_sample, dk_head)
    dv = _head_of(dv + part * dv_part, pair, heads, dv_sample, dv_head)
    _write(dk, dk_low * scale, dk_high * scale, key, dk_row, keys, channels, LOW, HIGH)
    _write(dv, dv_low, dv_high, key, dv_row, keys, channels, LOW, HIGH)
