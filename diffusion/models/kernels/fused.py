"""Triton kernels: norm, modulation, gate, residual and GELU with one pass over the tokens each way.

What the compiler does not do by itself: a backward pass that makes the gradient of the tokens (sums over a row) and
those of shift, scale, gate and bias (sums over the tokens) while it reads them once. Sums over tokens are taken over a
few rows in registers; the rest of the sum is over a small tensor of such parts.

Legend: B batch, N tokens, D width. Arithmetic is in float32. Modulations are (B, 1, D) and may be strided views of all
six of a block, as long as D is contiguous.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from diffusion.models.kernels.elementwise import EPS, logistic_gelu
from diffusion.models.kernels.gelu_triton import gelu_and_slope

# What programs take: rows of tokens that a backward pass sums over, and the tile of a GELU; as fastest on an H200.
_NORM = {"num_warps": 4}
_NORM_BACKWARD = {"ROWS": 8, "num_warps": 4}
_GATE_BACKWARD = {"ROWS": 16, "num_warps": 8}
_GELU_BACKWARD = {"ROWS": 32, "BLOCK": 128, "num_warps": 4}


@triton.jit
def _norm_forward(
    tokens, update, shift, scale, summed, out, mean, rstd, length, width, shift_stride, scale_stride, eps,
    HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // length
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(tokens + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        x += tl.load(update + row * width + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(summed.dtype.element_ty)  # what the next layers read is what is normalised
        tl.store(summed + row * width + column, x, mask=inside)
        x = x.to(tl.float32)
    centre = tl.sum(x, 0) / width
    centred = tl.where(inside, x - centre, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    factor = tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + sample * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = centred * inverse * (1.0 + factor) + offset
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + row, centre)
    tl.store(rstd + row, inverse)


@triton.jit
def _norm_backward(
    grad_out, grad_summed, x_in, mean, rstd, scale, grad_x, shift_parts, scale_parts, length, width, scale_stride,
    HAS_SUMMED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    factor = 1.0 + tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    at, here = (sample * length + chunk * ROWS) * width + column, inside & (chunk * ROWS < length)
    dy_next = tl.load(grad_out + at, mask=here, other=0.0)
    x_next = tl.load(x_in + at, mask=here, other=0.0)
    summed_next = tl.load(grad_summed + at, mask=here, other=0.0)
    for index in range(ROWS):
        token = chunk * ROWS + index
        row, is_row = sample * length + token, token < length
        dy, x, dsummed = dy_next.to(tl.float32), x_next.to(tl.float32), summed_next
        centre = tl.load(mean + row, mask=is_row, other=0.0)
        inverse = tl.load(rstd + row, mask=is_row, other=0.0)
        at, here = at + width, inside & (token + 1 < length)
        if index + 1 < ROWS:  # asked for before this row is used: its sums wait for all of it, and its way is long
            dy_next = tl.load(grad_out + at, mask=here, other=0.0)
            x_next = tl.load(x_in + at, mask=here, other=0.0)
            if HAS_SUMMED:
                summed_next = tl.load(grad_summed + at, mask=here, other=0.0)
        normal = tl.where(inside & is_row, (x - centre) * inverse, 0.0)
        shift_sum += dy
        scale_sum += dy * normal
        dnormal = dy * factor
        dx = inverse * (dnormal - tl.sum(dnormal, 0) / width - normal * (tl.sum(dnormal * normal, 0) / width))
        if HAS_SUMMED:
            dx += dsummed.to(tl.float32)
        tl.store(grad_x + row * width + column, dx.to(grad_x.dtype.element_ty), mask=inside & is_row)
    part = (sample * tl.num_programs(1) + chunk) * width + column
    tl.store(shift_parts + part, shift_sum, mask=inside)
    tl.store(scale_parts + part, scale_sum, mask=inside)


@triton.jit
def _gate_backward(
    grad_out, update, gate, grad_update, gate_parts, length, width, gate_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    factor = tl.load(gate + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    for index in range(ROWS):
        token = chunk * ROWS + index
        here = inside & (token < length)
        at = (sample * length + token) * width + column
        dy = tl.load(grad_out + at, mask=here, other=0.0).to(tl.float32)
        gate_sum += dy * tl.load(update + at, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_update + at, (dy * factor).to(grad_update.dtype.element_ty), mask=here)
    part = (sample * tl.num_programs(1) + chunk) * width + column
    tl.store(gate_parts + part, gate_sum, mask=inside)


@triton.jit
def _gelu_backward(
    grad_out, hidden, out, grad_hidden, bias_parts, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gelu(h), the gradient of h, and its sums over the rows of a program."""
    first, column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    inside = (first + row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]  # in 32 bits: faster, and a program's own rows are few
    hidden, grad_out, out, grad_hidden = (
        hidden + first * width, grad_out + first * width, out + first * width, grad_hidden + first * width
    )  # fmt: skip
    h = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    activated, slope = gelu_and_slope(h)
    dh = dy * slope
    tl.store(out + at, activated.to(out.dtype.element_ty), mask=inside)
    tl.store(grad_hidden + at, dh.to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(bias_parts + tl.program_id(0) * width + column, tl.sum(dh, 0), mask=column < width)


# Rows of a program that shapes depend on are arguments of the operators: the compiler's cache knows those alone.
# The compiler takes these operators as they are. It has little to fuse into them: matrix products lie around them, and
# its own kernels for norms read a row of 1152 several times.


def _block(width: int) -> int:
    return triton.next_power_of_2(width)


def _parts(tokens: Tensor, rows: int) -> Tensor:
    """Room for the parts of a modulation's gradient, (B, chunks of so many rows, D) float32, which are then summed up:
    outside of the operator, where the compiler joins that with what follows."""
    return tokens.new_empty(tokens.shape[0], -(-tokens.shape[1] // rows), tokens.shape[2], dtype=torch.float32)


def _dense(modulation: Tensor, tokens: Tensor) -> Tensor:
    """(B or 1, 1, D) as (B, 1, D): rows are contiguous, samples a stride apart, which is 0 where all share a row."""
    modulation = modulation if modulation.stride(-1) == 1 else modulation.contiguous()
    return modulation.expand(tokens.shape[0], -1, -1)


# ---- norm and modulation, with or without a residual before them ----


@custom_op("pixart::modulated_norm", mutates_args=())
def _modulated_norm(tokens: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(tokens, dtype=dtype)
    mean, rstd = _statistics(tokens)
    _run_norm(tokens, None, shift, scale, tokens, out, mean, rstd)
    return out, mean, rstd


@_modulated_norm.register_fake
def _(tokens: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(tokens, dtype=dtype), *_statistics(tokens)


@custom_op("pixart::residual_norm", mutates_args=())
def _residual_norm(
    tokens: Tensor, update: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed, out = torch.empty_like(tokens), torch.empty_like(tokens, dtype=dtype)
    mean, rstd = _statistics(tokens)
    _run_norm(tokens, update, shift, scale, summed, out, mean, rstd)
    return summed, out, mean, rstd


@_residual_norm.register_fake
def _(
    tokens: Tensor, update: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(tokens, dtype=dtype), *_statistics(tokens)


def _statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    shape = tokens.shape[:-1]
    return tokens.new_empty(shape, dtype=torch.float32), tokens.new_empty(shape, dtype=torch.float32)


def _run_norm(
    tokens: Tensor, update: Tensor | None, shift: Tensor, scale: Tensor, summed: Tensor, out: Tensor, mean: Tensor,
    rstd: Tensor,
) -> None:  # fmt: skip
    batch, length, width = tokens.shape
    _norm_forward[(batch * length,)](
        tokens, tokens if update is None else update, shift, scale, summed, out, mean, rstd, length, width,
        shift.stride(0), scale.stride(0), EPS, HAS_UPDATE=update is not None, BLOCK=_block(width), **_NORM,
    )  # fmt: skip


@custom_op("pixart::norm_backward", mutates_args=())
def _norm_gradients(
    grad_out: Tensor, grad_summed: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, *parts = _norm_room(x, rows)
    _norm_backward[parts[0].shape[:2]](
        grad_out, grad_out if grad_summed is None else grad_summed, x, mean, rstd, scale, grad_x, *parts, x.shape[1],
        x.shape[2], scale.stride(0), HAS_SUMMED=grad_summed is not None, BLOCK=_block(x.shape[2]),
        **{**_NORM_BACKWARD, "ROWS": rows},
    )  # fmt: skip
    return grad_x, parts[0], parts[1]


@_norm_gradients.register_fake
def _(
    grad_out: Tensor, grad_summed: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_room(x, rows)


def _norm_room(x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradients of x, shift and scale."""
    return torch.empty_like(x), _parts(x, rows), _parts(x, rows)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    has_update = len(output) == 4
    tokens, scale = (output[0], inputs[3]) if has_update else (inputs[0], inputs[2])
    ctx.save_for_backward(tokens, *output[-2:], scale)
    ctx.update_dtype = inputs[1].dtype if has_update else None
    ctx.modulation_dtypes = [part.dtype for part in inputs[-3:-1]]
    ctx.set_materialize_grads(False)


def _norm_grads(ctx: Any, grad_out: Tensor | None, grad_summed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x, mean, rstd, scale = ctx.saved_tensors
    grad_out = x.new_zeros(x.shape) if grad_out is None else grad_out.contiguous()
    grad_summed = None if grad_summed is None else grad_summed.contiguous()
    grad_x, *modulations = _norm_gradients(grad_out, grad_summed, x, mean, rstd, scale, _NORM_BACKWARD["ROWS"])
    sums = [parts.sum(1, keepdim=True) for parts in modulations]
    shift, scale = (grad.to(dtype) for grad, dtype in zip(sums, ctx.modulation_dtypes))
    return grad_x, shift, scale


def _modulated_norm_backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*_norm_grads(ctx, grad_out, None), None)


def _residual_norm_backward(ctx: Any, grad_summed: Tensor | None, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grad_x, shift, scale = _norm_grads(ctx, grad_out, grad_summed)
    return grad_x, grad_x.to(ctx.update_dtype), shift, scale, None


_modulated_norm.register_autograd(_modulated_norm_backward, setup_context=_keep_norm)
_residual_norm.register_autograd(_residual_norm_backward, setup_context=_keep_norm)


def modulated_norm(tokens: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `elementwise.modulated_norm`; the result has `dtype`."""
    out: Tensor = _modulated_norm(tokens.contiguous(), _dense(shift, tokens), _dense(scale, tokens), dtype)[0]
    return out


class _KeptNorm(torch.autograd.Function):
    """Tokens as they are, and their norm; backward, the gradients of both meet in one kernel."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, mean, rstd = _modulated_norm(tokens, shift, scale, dtype)
        ctx.save_for_backward(tokens, mean, rstd, scale)
        ctx.modulation_dtypes = [shift.dtype, scale.dtype]
        return tokens.view_as(tokens), out

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor, grad_out: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return (*_norm_grads(ctx, grad_out, grad_tokens), None)


def kept_norm(tokens: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `elementwise.kept_norm`; the norm has `dtype`."""
    kept, out = _KeptNorm.apply(tokens.contiguous(), _dense(shift, tokens), _dense(scale, tokens), dtype)
    return kept, out


def residual_norm(
    tokens: Tensor, update: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `elementwise.residual_norm`; the norm has `dtype`, the sum the precision of the tokens."""
    shift, scale = _dense(shift, tokens), _dense(scale, tokens)
    parts = _residual_norm(tokens.contiguous(), update.contiguous(), shift, scale, dtype)
    return parts[0], parts[1]


# ---- gate and residual: the forward pass is the compiler's ----


@custom_op("pixart::gate_backward", mutates_args=())
def _gate_gradients(grad_out: Tensor, update: Tensor, gate: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    grad_update, parts = torch.empty_like(update), _parts(update, rows)
    _gate_backward[parts.shape[:2]](
        grad_out, update, gate, grad_update, parts, *update.shape[1:], gate.stride(0), BLOCK=_block(update.shape[2]),
        **{**_GATE_BACKWARD, "ROWS": rows},
    )  # fmt: skip
    return grad_update, parts


@_gate_gradients.register_fake
def _(grad_out: Tensor, update: Tensor, gate: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(update), _parts(update, rows)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate)
        out = tokens + gate * update
        # Not by a cast that does nothing: the compiler of torch 2.11 loses the gradient behind it.
        return out if out.dtype == tokens.dtype else out.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        update, gate = ctx.saved_tensors
        grad_update, parts = _gate_gradients(grad_out.contiguous(), update, gate, _GATE_BACKWARD["ROWS"])
        return grad_out, grad_update, parts.sum(1, keepdim=True).to(gate.dtype)


def gated_residual(tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """See `elementwise.gated_residual`; the result has the precision of the tokens."""
    out: Tensor = _GatedResidual.apply(tokens, update.contiguous(), _dense(gate, tokens))
    return out


# ---- the MLP: products by cuBLAS, what lies between them in one pass ----


def gelu_gradients(grad_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(hidden) and the gradient of `hidden`, both (M, K), and parts of its sum over rows, (chunks, K) float32."""
    out: tuple[Tensor, Tensor, Tensor] = _gelu_gradients(grad_out, hidden, _GELU_BACKWARD["ROWS"])
    return out


@custom_op("pixart::gelu_backward", mutates_args=())
def _gelu_gradients(grad_out: Tensor, hidden: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    room, (count, width), tile = _gelu_room(hidden, rows), hidden.shape, {**_GELU_BACKWARD, "ROWS": rows}
    _gelu_backward[(room[2].shape[0], triton.cdiv(width, tile["BLOCK"]))](grad_out, hidden, *room, count, width, **tile)
    return room


@_gelu_gradients.register_fake
def _(grad_out: Tensor, hidden: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return _gelu_room(hidden, rows)


def _gelu_room(hidden: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the GELU, the gradient of its input, and the parts of the bias's gradient."""
    parts = hidden.new_empty(-(-hidden.shape[0] // rows), hidden.shape[1], dtype=torch.float32)
    return torch.empty_like(hidden), torch.empty_like(hidden), parts


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden = F.linear(tokens, weight1, bias1)
        ctx.save_for_backward(tokens, weight1, bias1, weight2, bias2, hidden)
        return F.linear(logistic_gelu(hidden), weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        tokens, weight1, bias1, weight2, bias2, hidden = ctx.saved_tensors
        rows, grad = tokens.flatten(0, -2), grad_out.flatten(0, -2)
        activated, grad_hidden, parts = gelu_gradients(grad @ weight2, hidden.flatten(0, -2))
        return (
            (grad_hidden @ weight1).view_as(tokens),
            grad_hidden.t() @ rows,
            parts.sum(0).to(bias1.dtype),
            grad.t() @ activated,
            grad.sum(0, dtype=torch.float32).to(bias2.dtype),
        )


def gelu_mlp(tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """See `elementwise.gelu_mlp`; all inputs have one precision."""
    with torch.autocast(tokens.device.type, enabled=False):
        out: Tensor = _GeluMLP.apply(tokens, weight1, bias1, weight2, bias2)
    return out
