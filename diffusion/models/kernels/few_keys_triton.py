"""Triton kernels of attention to few keys: a head of a sample is one program's work, so nothing is added up elsewhere.

Made for heads that are no power of two wide, such as the 72 channels of XL/2: a tile is split into MAIN channels and
REST more, of which the last may be padding. Sums are in float32; operands of products have the inputs' precision.

Legend: sample, head; queries, keys (their number); width channels of a head, which lie side by side, as do heads.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_FAR = tl.constexpr(-1e30)  # a logit that is left out; finite, for rows of which a first tile holds nothing


@triton.jit
def _place(first, count, stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of ROWS rows from `first` and COLUMNS channels from FIRST: where they lie, and which exist."""
    row, column = first + tl.arange(0, ROWS), FIRST + tl.arange(0, COLUMNS)
    return row[:, None] * stride + column[None, :], (row < count)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _load(
    base, first, count, stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    at, inside = _place(first, count, stride, WIDTH, FIRST, ROWS, COLUMNS)
    return tl.load(base + at, mask=inside, other=0.0)


@triton.jit
def _store(
    base,
    values,
    first,
    count,
    stride,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at, inside = _place(first, count, stride, WIDTH, FIRST, ROWS, COLUMNS)
    tl.store(base + at, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def attention_forward(
    q, k, v, mask, out, lse, queries, keys, heads, scale, q_batch, q_token, k_batch, k_token,
    HAS_MASK: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k^T) v of QUERIES rows, and the logarithm to base 2 of the softmax's denominators."""
    item, first = tl.program_id(1), tl.program_id(0) * QUERIES
    sample, head = (item // heads).to(tl.int64), item % heads
    q += sample * q_batch + head * WIDTH
    k += sample * k_batch + head * WIDTH
    v += sample * k_batch + head * WIDTH
    q_main = _load(q, first, queries, q_token, WIDTH, 0, QUERIES, MAIN)
    most = tl.full([QUERIES], _FAR, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sum_main = tl.zeros([QUERIES, MAIN], tl.float32)
    if REST > 0:
        q_rest = _load(q, first, queries, q_token, WIDTH, MAIN, QUERIES, REST)
        sum_rest = tl.zeros([QUERIES, REST], tl.float32)
    for start in range(0, keys, KEYS):
        logits = tl.dot(q_main, tl.trans(_load(k, start, keys, k_token, WIDTH, 0, KEYS, MAIN)))
        if REST > 0:
            logits = tl.dot(q_rest, tl.trans(_load(k, start, keys, k_token, WIDTH, MAIN, KEYS, REST)), logits)
        key = start + tl.arange(0, KEYS)
        seen = key < keys
        if HAS_MASK:
            seen = seen & (tl.load(mask + sample * keys + key, mask=seen, other=0) != 0)
        logits = tl.where(seen[None, :], logits * (scale * 1.4426950408889634), _FAR)
        above = tl.maximum(most, tl.max(logits, 1))
        shares = tl.exp2(logits - above[:, None])
        fade = tl.exp2(most - above)
        most = above
        total = total * fade + tl.sum(shares, 1)
        shares = shares.to(q_main.dtype)
        sum_main = tl.dot(shares, _load(v, start, keys, k_token, WIDTH, 0, KEYS, MAIN), sum_main * fade[:, None])
        if REST > 0:
            sum_rest = tl.dot(shares, _load(v, start, keys, k_token, WIDTH, MAIN, KEYS, REST), sum_rest * fade[:, None])
    out += sample * queries * heads * WIDTH + head * WIDTH
    _store(out, sum_main / total[:, None], first, queries, heads * WIDTH, WIDTH, 0, QUERIES, MAIN)
    if REST > 0:
        _store(out, sum_rest / total[:, None], first, queries, heads * WIDTH, WIDTH, MAIN, QUERIES, REST)
    row = first + tl.arange(0, QUERIES)
    tl.store(lse + item.to(tl.int64) * queries + row, most + tl.log2(total), mask=row < queries)


@triton.jit
def _add_up(
    base, partial, values, start, keys, scale, first, queries, stride,
    WIDTH: tl.constexpr, ONE_TILE: tl.constexpr, FIRST: tl.constexpr, QUERIES: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries by a tile of keys. Their sum with those before waits in `partial`, but for the last one."""
    at, inside = _place(first, queries, stride, WIDTH, FIRST, QUERIES, COLUMNS)
    if not ONE_TILE:
        part, _ = _place(first, queries, WIDTH, WIDTH, FIRST, QUERIES, COLUMNS)
        values += tl.load(partial + part, mask=inside & (start > 0), other=0.0)
        tl.store(partial + part, values, mask=inside & (start + KEYS < keys))
        inside = inside & (start + KEYS >= keys)
    tl.store(base + at, (values * scale).to(base.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    out,
    grad_out,
    first,
    count,
    stride,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of each row with its gradient."""
    o = _load(out, first, count, stride, WIDTH, FIRST, ROWS, COLUMNS).to(tl.float32)
    return tl.sum(o * _load(grad_out, first, count, stride, WIDTH, FIRST, ROWS, COLUMNS).to(tl.float32), 1)


@triton.jit
def attention_backward(
    q, k, v, mask, out, lse, grad_out, grad_q, grad_k, grad_v, deltas, partial, items, queries, keys, heads, scale,
    q_batch, q_token, k_batch, k_token, grad_q_batch, grad_q_token, grad_k_batch, grad_k_token,
    HAS_MASK: tl.constexpr, ONE_TILE: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and v of the heads that are this program's, KEYS keys at a time.

    Not used where one tile holds all keys:
    deltas: of the shape of lse, room for the products of outputs and their gradients.
    partial: (programs, queries, WIDTH) float32, which stays in the cache.
    """
    partial += tl.program_id(0).to(tl.int64) * queries * WIDTH
    token = heads * WIDTH
    for turn in range(0, tl.cdiv(items, tl.num_programs(0))):
        item = turn * tl.num_programs(0) + tl.program_id(0).to(tl.int64)
        item = tl.minimum(item, items - 1)  # in the last turn several programs may write the same
        sample, head = item // heads, item % heads
        base_q = q + sample * q_batch + head * WIDTH
        base_dq = grad_q + sample * grad_q_batch + head * WIDTH
        base_o = out + sample * queries * token + head * WIDTH
        base_do = grad_out + sample * queries * token + head * WIDTH
        if not ONE_TILE:
            for first in range(0, queries, QUERIES):
                row = first + tl.arange(0, QUERIES)
                delta = _product(base_o, base_do, first, queries, token, WIDTH, 0, QUERIES, MAIN)
                if REST > 0:
                    delta += _product(base_o, base_do, first, queries, token, WIDTH, MAIN, QUERIES, REST)
                tl.store(deltas + item * queries + row, delta, mask=row < queries)
        at_k, at_dk = sample * k_batch + head * WIDTH, sample * grad_k_batch + head * WIDTH
        for start in range(0, keys, KEYS):
            key = start + tl.arange(0, KEYS)
            seen = key < keys
            if HAS_MASK:
                seen = seen & (tl.load(mask + sample * keys + key, mask=seen, other=0) != 0)
            k_main = _load(k + at_k, start, keys, k_token, WIDTH, 0, KEYS, MAIN)
            v_main = _load(v + at_k, start, keys, k_token, WIDTH, 0, KEYS, MAIN)
            dk_main = tl.zeros([KEYS, MAIN], tl.float32)
            dv_main = tl.zeros([KEYS, MAIN], tl.float32)
            if REST > 0:
                k_rest = _load(k + at_k, start, keys, k_token, WIDTH, MAIN, KEYS, REST)
                v_rest = _load(v + at_k, start, keys, k_token, WIDTH, MAIN, KEYS, REST)
                dk_rest = tl.zeros([KEYS, REST], tl.float32)
                dv_rest = tl.zeros([KEYS, REST], tl.float32)
            if not ONE_TILE:
                tl.debug_barrier()  # `deltas` and `partial` are read by other threads than those that wrote them
            for first in range(0, queries, QUERIES):
                q_main = _load(base_q, first, queries, q_token, WIDTH, 0, QUERIES, MAIN)
                do_main = _load(base_do, first, queries, token, WIDTH, 0, QUERIES, MAIN)
                logits = tl.dot(k_main, tl.trans(q_main))  # (keys, queries)
                dshares = tl.dot(v_main, tl.trans(do_main))
                if REST > 0:
                    q_rest = _load(base_q, first, queries, q_token, WIDTH, MAIN, QUERIES, REST)
                    do_rest = _load(base_do, first, queries, token, WIDTH, MAIN, QUERIES, REST)
                    logits = tl.dot(k_rest, tl.trans(q_rest), logits)
                    dshares = tl.dot(v_rest, tl.trans(do_rest), dshares)
                row = first + tl.arange(0, QUERIES)
                whole = tl.load(lse + item * queries + row, mask=row < queries, other=float("inf"))
                shares = tl.exp2(logits * (scale * 1.4426950408889634) - whole[None, :])
                shares = tl.where(seen[:, None], shares, 0.0)
                if ONE_TILE:  # the product of a row of outputs with its gradient, from what is at hand
                    delta = tl.sum(shares * dshares, 0)
                else:
                    delta = tl.load(deltas + item * queries + row, mask=row < queries, other=0.0)
                dlogits = (shares * (dshares - delta[None, :])).to(q_main.dtype)
                shares = shares.to(q_main.dtype)
                dv_main = tl.dot(shares, do_main, dv_main)
                dk_main = tl.dot(dlogits, q_main, dk_main)
                by_query = tl.trans(dlogits)
                _add_up(
                    base_dq, partial, tl.dot(by_query, k_main), start, keys, scale, first, queries, grad_q_token,
                    WIDTH, ONE_TILE, 0, QUERIES, MAIN, KEYS,
                )  # fmt: skip
                if REST > 0:
                    dv_rest = tl.dot(shares, do_rest, dv_rest)
                    dk_rest = tl.dot(dlogits, q_rest, dk_rest)
                    _add_up(
                        base_dq, partial, tl.dot(by_query, k_rest), start, keys, scale, first, queries, grad_q_token,
                        WIDTH, ONE_TILE, MAIN, QUERIES, REST, KEYS,
                    )  # fmt: skip
            _store(grad_k + at_dk, dk_main * scale, start, keys, grad_k_token, WIDTH, 0, KEYS, MAIN)
            _store(grad_v + at_dk, dv_main, start, keys, grad_k_token, WIDTH, 0, KEYS, MAIN)
            if REST > 0:
                _store(grad_k + at_dk, dk_rest * scale, start, keys, grad_k_token, WIDTH, MAIN, KEYS, REST)
                _store(grad_v + at_dk, dv_rest, start, keys, grad_k_token, WIDTH, MAIN, KEYS, REST)
