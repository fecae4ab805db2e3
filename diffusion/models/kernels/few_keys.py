"""Attention to few keys, such as those of a caption, with a mask that costs nothing: operators around Triton kernels.

Legend: B batch, H heads, N queries, L keys, c channels a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from diffusion.models.kernels import few_keys_triton as kernels

# What programs take, as fastest on an H200 for the 120 tokens of a caption.
_FORWARD = {"QUERIES": 64, "KEYS": 64, "num_warps": 4, "num_stages": 3}
_BACKWARD = {"QUERIES": 64, "KEYS": 128, "num_warps": 8, "num_stages": 2}
_FULL_STAGES = 128 * 1024  # bytes of shared memory that a program needs to load ahead while it computes
_PROGRAMS = 264  # of a backward pass whose keys are more than one tile: two for each processor of an H200


def attend_few(q: Tensor, pair: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(c)) v.

    Args:
        q: (B, N, H, c). pair: keys and values, (2, B, L, H, c).
        mask: (B, L) bool, True = keep, one key of each sample at least; None = all.
    Returns:
        (B, N, H, c).
    """
    q, pair = (part if _is_plain(part) else part.contiguous() for part in (q, pair))
    out: Tensor = _attention(q, pair, None if mask is None else mask.contiguous())[0]
    return out


def _is_plain(heads: Tensor) -> bool:
    """Whether a token's heads, and their channels, lie one after another."""
    return heads.stride(-1) == 1 and heads.stride(-2) == heads.shape[-1]


@custom_op("pixart::few_keys", mutates_args=())
def _attention(q: Tensor, pair: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = _room(q)
    (batch, queries, heads, width), keys = q.shape, pair.shape[2]
    kernels.attention_forward[(triton.cdiv(queries, _FORWARD["QUERIES"]), batch * heads)](
        q, pair[0], pair[1], q if mask is None else mask, out, lse, queries, keys, heads, width**-0.5,
        *q.stride()[:2], *pair.stride()[1:3], HAS_MASK=mask is not None, **_columns(width), **_FORWARD,
    )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(q: Tensor, pair: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _room(q)


def _room(q: Tensor) -> tuple[Tensor, Tensor]:
    """Of the result, and of the logarithms of softmax's denominators, (B, H, N)."""
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


@custom_op("pixart::few_keys_backward", mutates_args=())
def _gradients(
    grad_out: Tensor, q: Tensor, pair: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    grad_q, grad_pair = _room_of_gradients(q, pair)
    tile = _BACKWARD if _shared_memory(q.device) >= _FULL_STAGES else {**_BACKWARD, "num_stages": 1}
    (batch, queries, heads, width), keys = q.shape, pair.shape[2]
    one_tile = keys <= _BACKWARD["KEYS"]
    programs = batch * heads if one_tile else min(_PROGRAMS, batch * heads)
    partial, deltas = lse, lse
    if not one_tile:
        partial, deltas = q.new_empty((programs, queries, width), dtype=torch.float32), torch.empty_like(lse)
    kernels.attention_backward[(programs,)](
        q, pair[0], pair[1], q if mask is None else mask, out, lse, grad_out, grad_q, grad_pair[0], grad_pair[1],
        deltas, partial, batch * heads, queries, keys, heads, width**-0.5, *q.stride()[:2],
        *pair.stride()[1:3], *grad_q.stride()[:2], *grad_pair.stride()[1:3], HAS_MASK=mask is not None,
        ONE_TILE=one_tile, **_columns(width), **tile,
    )  # fmt: skip
    return grad_q, grad_pair


@_gradients.register_fake
def _(
    grad_out: Tensor, q: Tensor, pair: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return _room_of_gradients(q, pair)


def _room_of_gradients(q: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """The second one lies as what one layer makes of a token's keys and values: (B, L, 2, H, c)."""
    two, batch, keys, heads, width = pair.shape
    return q.new_empty(q.shape), pair.new_empty((batch, keys, two, heads, width)).movedim(2, 0)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined, no-any-return]


def _columns(width: int) -> dict[str, int]:
    """Channels of a head, as the two powers of two that a program takes them by."""
    main = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(width - main)) if width > main else 0
    return {"WIDTH": width, "MAIN": main, "REST": rest}


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, None
    return (*_gradients(grad_out.contiguous(), *ctx.saved_tensors), None)


_attention.register_autograd(_backward, setup_context=_keep)
