"""Triton kernels of attention over few keys: the 256 tokens of a picture of 256 px, or the 120 of a caption.

Kernels made for long sequences leave most of a card idle there, and those that take a mask are slower still. Softmax
and sums are in float32; a head of 72 channels is computed as 64 + 16, not as 128.

Legend: B batch, H heads, N queries, M keys, c channels a head. The formulas are those of FlashAttention
(arXiv:2205.14135, Alg. 1 and 4): with P = softmax and D = rowsum(dO O), dS = P (dO V^T - D).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from diffusion.models.kernels.elementwise import INTERPRETED

_ALONE = 128  # keys whose gradients one program can hold, and that of each query beside them
_PROGRAMS = 528  # wanted at least: four for each multiprocessor of an H100
# Queries and keys of a tile, warps. None of them spills registers on sm_90 at 72 channels, but the last (52 bytes).
_TILES = {"forward": (64, 64, 4), "queries": (64, 64, 4), "keys": (64, 64, 4), "alone": (32, 128, 8)}


@triton.jit
def _rows(start, row, stride, column, num_rows, channels, WIDE: tl.constexpr):
    inside = (row < num_rows)[:, None] & (column < channels)[None, :]
    values = tl.load(start + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
    return values.to(tl.float32) if WIDE else values


@triton.jit
def _write(start, values, row, stride, column, num_rows, channels):
    inside = (row < num_rows)[:, None] & (column < channels)[None, :]
    tl.store(start + row[:, None] * stride + column[None, :], values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


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
def _forward(
    q, k, v, keep, out, lse, heads, queries, keys, channels, scale2,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, o_sample, o_row, o_head,
    HAS_KEEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out, and the logarithm (base 2) of each row's sum of exponentials; scale2 = scale / ln 2."""
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // heads, pair % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, 16 if HIGH == 0 else HIGH)
    q += sample * q_sample + head * q_head
    k += sample * k_sample + head * k_head
    v += sample * v_sample + head * v_head
    out += sample * o_sample + head * o_head
    q_low = _rows(q, row, q_row, low, queries, channels, WIDE)
    sum_low = tl.zeros([ROWS, LOW], tl.float32)
    if HIGH:
        q_high = _rows(q, row, q_row, high, queries, channels, WIDE)
        sum_high = tl.zeros([ROWS, HIGH], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a block without a key to keep changes nothing
    total = tl.zeros([ROWS], tl.float32)
    for step in range(tl.cdiv(keys, KEYS)):
        key = step * KEYS + tl.arange(0, KEYS)
        logits = _product(q_low, tl.trans(_rows(k, key, k_row, low, keys, channels, WIDE)))
        if HIGH:
            logits += _product(q_high, tl.trans(_rows(k, key, k_row, high, keys, channels, WIDE)))
        seen = _seen(keep, sample, key, keys, HAS_KEEP)
        logits = tl.where(seen[None, :], logits * scale2, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights, shrunk = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
        top, total = higher, total * shrunk + tl.sum(weights, 1)
        rounded = _factor(weights, q, WIDE)
        sum_low = sum_low * shrunk[:, None] + _product(rounded, _rows(v, key, v_row, low, keys, channels, WIDE))
        if HIGH:
            sum_high = sum_high * shrunk[:, None] + _product(rounded, _rows(v, key, v_row, high, keys, channels, WIDE))
    _write(out, sum_low / total[:, None], row, o_row, low, queries, channels)
    if HIGH:
        _write(out, sum_high / total[:, None], row, o_row, high, queries, channels)
    tl.store(lse + pair * queries + row, top + tl.log2(total), mask=row < queries)


@triton.jit
def _backward_queries(
    q, k, v, keep, out, grad, lse, delta, dq, heads, queries, keys, channels, scale, scale2,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, o_sample, o_row, o_head,
    g_sample, g_row, g_head, dq_sample, dq_row, dq_head,
    HAS_KEEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dq and D of some queries, over all keys."""
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // heads, pair % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, 16 if HIGH == 0 else HIGH)
    q += sample * q_sample + head * q_head
    k += sample * k_sample + head * k_head
    v += sample * v_sample + head * v_head
    out += sample * o_sample + head * o_head
    grad += sample * g_sample + head * g_head
    dq += sample * dq_sample + head * dq_head
    q_low = _rows(q, row, q_row, low, queries, channels, WIDE)
    g_low = _rows(grad, row, g_row, low, queries, channels, WIDE)
    mean = tl.sum(g_low.to(tl.float32) * _rows(out, row, o_row, low, queries, channels, True), 1)
    dq_low = tl.zeros([ROWS, LOW], tl.float32)
    if HIGH:
        q_high = _rows(q, row, q_row, high, queries, channels, WIDE)
        g_high = _rows(grad, row, g_row, high, queries, channels, WIDE)
        mean += tl.sum(g_high.to(tl.float32) * _rows(out, row, o_row, high, queries, channels, True), 1)
        dq_high = tl.zeros([ROWS, HIGH], tl.float32)
    base = tl.load(lse + pair * queries + row, mask=row < queries, other=0.0)
    for step in range(tl.cdiv(keys, KEYS)):
        key = step * KEYS + tl.arange(0, KEYS)
        k_low = _rows(k, key, k_row, low, keys, channels, WIDE)
        logits = _product(q_low, tl.trans(k_low))
        by_weight = _product(g_low, tl.trans(_rows(v, key, v_row, low, keys, channels, WIDE)))
        if HIGH:
            k_high = _rows(k, key, k_row, high, keys, channels, WIDE)
            logits += _product(q_high, tl.trans(k_high))
            by_weight += _product(g_high, tl.trans(_rows(v, key, v_row, high, keys, channels, WIDE)))
        seen = _seen(keep, sample, key, keys, HAS_KEEP)
        weights = tl.where(seen[None, :], tl.exp2(logits * scale2 - base[:, None]), 0.0)
        by_logit = _factor(weights * (by_weight - mean[:, None]), q, WIDE)
        dq_low += _product(by_logit, k_low)
        if HIGH:
            dq_high += _product(by_logit, k_high)
    _write(dq, dq_low * scale, row, dq_row, low, queries, channels)
    if HIGH:
        _write(dq, dq_high * scale, row, dq_row, high, queries, channels)
    tl.store(delta + pair * queries + row, mean, mask=row < queries)


@triton.jit
def _backward_keys(
    q, k, v, keep, out, grad, lse, delta, dq, dk, dv, heads, queries, keys, channels, scale, scale2, span,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, o_sample, o_row, o_head,
    g_sample, g_row, g_head, dq_sample, dq_row, dq_head, dk_part, dk_sample, dk_row, dk_head,
    dv_part, dv_sample, dv_row, dv_head,
    ALONE: tl.constexpr, HAS_KEEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of some keys, over `span` queries; ALONE: of all keys, so that dq is made here too, and D."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    sample, head = pair // heads, pair % heads
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, 16 if HIGH == 0 else HIGH)
    q += sample * q_sample + head * q_head
    k += sample * k_sample + head * k_head
    v += sample * v_sample + head * v_head
    out += sample * o_sample + head * o_head
    grad += sample * g_sample + head * g_head
    dq += sample * dq_sample + head * dq_head
    dk += part * dk_part + sample * dk_sample + head * dk_head
    dv += part * dv_part + sample * dv_sample + head * dv_head
    k_low = _rows(k, key, k_row, low, keys, channels, WIDE)
    v_low = _rows(v, key, v_row, low, keys, channels, WIDE)
    dk_low = tl.zeros([KEYS, LOW], tl.float32)
    dv_low = tl.zeros([KEYS, LOW], tl.float32)
    if HIGH:
        k_high = _rows(k, key, k_row, high, keys, channels, WIDE)
        v_high = _rows(v, key, v_row, high, keys, channels, WIDE)
        dk_high = tl.zeros([KEYS, HIGH], tl.float32)
        dv_high = tl.zeros([KEYS, HIGH], tl.float32)
    seen = _seen(keep, sample, key, keys, HAS_KEEP)
    for step in range(tl.cdiv(span, ROWS)):
        row = part * span + step * ROWS + tl.arange(0, ROWS)
        q_low = _rows(q, row, q_row, low, queries, channels, WIDE)
        g_low = _rows(grad, row, g_row, low, queries, channels, WIDE)
        logits = _product(k_low, tl.trans(q_low))  # (KEYS, ROWS), as all here
        by_weight = _product(v_low, tl.trans(g_low))
        if ALONE:
            mean = tl.sum(g_low.to(tl.float32) * _rows(out, row, o_row, low, queries, channels, True), 1)
        else:
            mean = tl.load(delta + pair * queries + row, mask=row < queries, other=0.0)
        if HIGH:
            q_high = _rows(q, row, q_row, high, queries, channels, WIDE)
            g_high = _rows(grad, row, g_row, high, queries, channels, WIDE)
            logits += _product(k_high, tl.trans(q_high))
            by_weight += _product(v_high, tl.trans(g_high))
            if ALONE:
                mean += tl.sum(g_high.to(tl.float32) * _rows(out, row, o_row, high, queries, channels, True), 1)
        base = tl.load(lse + pair * queries + row, mask=row < queries, other=0.0)
        inside = seen[:, None] & (row < queries)[None, :]
        weights = tl.where(inside, tl.exp2(logits * scale2 - base[None, :]), 0.0)
        rounded = _factor(weights, q, WIDE)
        by_logit = _factor(weights * (by_weight - mean[None, :]), q, WIDE)
        dv_low += _product(rounded, g_low)
        dk_low += _product(by_logit, q_low)
        if HIGH:
            dv_high += _product(rounded, g_high)
            dk_high += _product(by_logit, q_high)
        if ALONE:
            turned = tl.trans(by_logit)
            _write(dq, _product(turned, k_low) * scale, row, dq_row, low, queries, channels)
            if HIGH:
                _write(dq, _product(turned, k_high) * scale, row, dq_row, high, queries, channels)
    _write(dk, dk_low * scale, key, dk_row, low, keys, channels)
    _write(dv, dv_low, key, dv_row, low, keys, channels)
    if HIGH:
        _write(dk, dk_high * scale, key, dk_row, high, keys, channels)
        _write(dv, dv_high, key, dv_row, high, keys, channels)


def _halves(channels: int) -> tuple[int, int]:
    """A head's channels as two widths that products can have: 72 -> 64 and 16."""
    low = 1 << (channels.bit_length() - 1)
    rest = channels - low
    return max(16, low), 0 if rest == 0 or low < 16 else max(16, triton.next_power_of_2(rest))


def _common(q: Tensor, keep: Tensor | None) -> dict[str, Any]:
    low, high = _halves(q.shape[-1])
    return {"HAS_KEEP": keep is not None, "LOW": low, "HIGH": high, "WIDE": INTERPRETED}  # it multiplies no bfloat16


def _places(*tensors: Tensor) -> list[int]:
    """Strides of samples, rows and heads of (B, N, H, c) tensors whose channels are contiguous."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the output and the logarithms of the sums."""
    batch, queries, heads, channels = q.shape
    room = q.new_empty(batch, queries, heads, channels)
    return room, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _run_forward(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, channels = q.shape
    out, lse = _outputs(q)
    rows, block, warps = _TILES["forward"]
    _forward[(batch * heads, triton.cdiv(queries, rows))](
        q, k, v, q if keep is None else keep, out, lse, heads, queries, k.shape[1], channels, scale / math.log(2),
        *_places(q, k, v, out), ROWS=rows, KEYS=block, num_warps=warps, **_common(q, keep),
    )  # fmt: skip
    return out, lse


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, out: Tensor, grad: Tensor, lse: Tensor, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Fill dq, dk, dv: like q, k, v, but for their strides; dk and dv have parts in front, whose sum they are."""
    batch, queries, heads, channels = q.shape
    keys, parts, is_alone = k.shape[1], dk.shape[0], k.shape[1] <= _ALONE
    given = (q, k, v, q if keep is None else keep, out, grad, lse)
    counts = (heads, queries, keys, channels, scale, scale / math.log(2))
    places, common, delta = _places(q, k, v, out, grad, dq), _common(q, keep), lse
    if not is_alone:
        delta = torch.empty_like(lse)
        rows, block, warps = _TILES["queries"]
        _backward_queries[(batch * heads, triton.cdiv(queries, rows))](
            *given, delta, dq, *counts, *places, ROWS=rows, KEYS=block, num_warps=warps, **common
        )
    rows, block, warps = _TILES["alone" if is_alone else "keys"]
    span = triton.cdiv(triton.cdiv(queries, parts), rows) * rows
    further = [stride for tensor in (dk, dv) for stride in tensor.stride()[:4]]
    _backward_keys[(batch * heads, triton.cdiv(keys, block), parts)](
        *given, delta, dq, dk, dv, *counts, span, *places, *further, ALONE=is_alone, ROWS=rows, KEYS=block,
        num_warps=warps, **common,
    )  # fmt: skip


# The compiler takes these operators as they are: it has nothing to fuse into them, and would copy gradients that share
# one tensor.


# ---- queries, keys and values apart: cross-attention ----


@custom_op("pixart::few_keys", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _run_forward(q, k, v, keep, scale)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@custom_op("pixart::few_keys_backward", mutates_args=())
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, out: Tensor, grad: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    # Many queries of few heads are shared out among programs, whose sums over queries are added up afterwards.
    parts = min(triton.cdiv(_PROGRAMS, batch * heads), triton.cdiv(queries, 256)) if k.shape[1] <= _ALONE else 1
    dtype = k.dtype if parts == 1 else torch.float32
    dq = q.new_empty(q.shape)
    dk, dv = (part.new_empty(parts, *part.shape, dtype=dtype) for part in (k, v))
    _run_backward(q, k, v, keep, out, grad, lse, scale, dq, dk, dv)
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


@_gradients.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, out: Tensor, grad: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keep, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, keep, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, keep, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else _with_rows(grad)
    return (*_gradients(q, k, v, keep, out, grad, lse, ctx.scale), None, None)


_attend.register_autograd(_backward, setup_context=_keep_for_backward)


# ---- heads of one projection: self-attention, whose gradients need no joining ----


@custom_op("pixart::few_tokens", mutates_args=())
def _attend_itself(heads: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = heads.chunk(3, dim=2)
    return _run_forward(q, k, v, None, scale)


@_attend_itself.register_fake
def _(heads: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(heads.chunk(3, dim=2)[0])


@custom_op("pixart::few_tokens_backward", mutates_args=())
def _own_gradients(heads: Tensor, out: Tensor, grad: Tensor, lse: Tensor, scale: float) -> Tensor:
    dheads = heads.new_empty(heads.shape)
    q, k, v = heads.chunk(3, dim=2)
    dq, dk, dv = dheads.chunk(3, dim=2)
    _run_backward(q, k, v, None, out, grad, lse, scale, dq, dk[None], dv[None])
    return dheads


@_own_gradients.register_fake
def _(heads: Tensor, out: Tensor, grad: Tensor, lse: Tensor, scale: float) -> Tensor:
    return heads.new_empty(heads.shape)


def _keep_own(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    heads, ctx.scale = inputs
    ctx.save_for_backward(heads, *output)
    ctx.set_materialize_grads(False)


def _own_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    heads, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else _with_rows(grad)
    return _own_gradients(heads, out, grad, lse, ctx.scale), None


_attend_itself.register_autograd(_own_backward, setup_context=_keep_own)


def _with_rows(tensor: Tensor) -> Tensor:
    """With contiguous channels, which the kernels read."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def attend_few_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, exact for any number of keys, made for few.

    Args:
        q: (B, N, H, c). k, v: (B, M, H, c). mask: (B, 1, 1, M) bool, True = keep; None = every key.
    Returns:
        (B, N, H, c).
    """
    keep = None if mask is None else mask[:, 0, 0].contiguous().view(torch.uint8)
    out: Tensor = _attend(*map(_with_rows, (q, k, v)), keep, scale)[0]
    return out


def attend_few_tokens(heads: Tensor, scale: float) -> Tensor:
    """Self-attention: (B, N, 3 H, c), queries before keys before values -> (B, N, H, c)."""
    out: Tensor = _attend_itself(_with_rows(heads), scale)[0]
    return out
