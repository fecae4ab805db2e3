"""Attention over few keys by Triton kernels: the 256 tokens of a picture of 256 px, or the 120 of a caption.

Kernels made for long sequences leave most of a card idle there, and those that take a mask are slower still. Softmax
and sums are in float32; a head of 72 channels is computed as 64 + 16, not as 128.

Legend: B batch, H heads, N queries, M keys, c channels a head. The formulas are those of FlashAttention
(arXiv:2205.14135, Alg. 1 and 4): with P = softmax and D = rowsum(dO O), dS = P (dO V^T - D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from diffusion.models.kernels.elementwise import INTERPRETED
from diffusion.models.kernels.few_keys_triton import backward_keys, backward_queries, forward

_ALONE = 128  # keys whose gradients one program can hold, and that of each query beside them
_PROGRAMS = 528  # wanted at least: four for each multiprocessor of an H100
# Queries and keys of a tile, warps. At 72 channels on sm_90 at most 64 bytes of registers are spilled, by the last.
_TILES = {"forward": (64, 64, 4), "queries": (64, 64, 4), "keys": (64, 64, 4), "alone": (32, 128, 8)}


def _halves(channels: int) -> tuple[int, int]:
    """A head's channels as two widths that products can have: 72 -> 64 and 16."""
    low = 1 << (channels.bit_length() - 1)
    rest = channels - low
    return max(16, low), 0 if rest == 0 or low < 16 else max(16, triton.next_power_of_2(rest))


def _common(q: Tensor, keep: Tensor | None) -> dict[str, Any]:
    low, high = _halves(q.shape[-1])
    return {"HAS_KEEP": keep is not None, "LOW": low, "HIGH": high, "WIDE": INTERPRETED}


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
    forward[(batch * heads, triton.cdiv(queries, rows))](
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
        backward_queries[(batch * heads, triton.cdiv(queries, rows))](
            *given, delta, dq, *counts, *places, ROWS=rows, KEYS=block, num_warps=warps, **common
        )
    rows, block, warps = _TILES["alone" if is_alone else "keys"]
    span = triton.cdiv(triton.cdiv(queries, parts), rows) * rows
    further = [stride for tensor in (dk, dv) for stride in tensor.stride()[:4]]
    backward_keys[(batch * heads, triton.cdiv(keys, block), parts)](
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
