"""Norm, modulation, gate, residual and GELU: in plain torch, or as one pass each way on a GPU.

Legend: B batch, N image tokens, D width. The fused forms compute in float32 whatever the inputs' precision, and need
CUDA and Triton; elsewhere `fused=True` runs the plain form, but for the GELU of compiled blocks on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F

from diffusion.models.kernels.availability import can_run, product_dtype
from diffusion.models.kernels.fp8 import rounds_by_row

EPS = 1e-6
_GELU_SCALE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_SCALE


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part: tokens (B, N, D), shift and scale (B, 1, D)."""
    return tokens * (1 + scale) + shift


def modulated_norm(tokens: Tensor, shift: Tensor, scale: Tensor, *, fused: bool = False) -> Tensor:
    """LayerNorm without weights, then `modulate`: (B, N, D), (B, 1, D), (B, 1, D) -> (B, N, D).

    Returns the precision that a matrix product would read under autocast, if fused; else what torch makes of it.
    """
    if fused and can_run(tokens.device):
        from diffusion.models.kernels import fused as kernels

        return kernels.modulated_norm(tokens, shift, scale, product_dtype(tokens))
    return modulate(F.layer_norm(tokens, tokens.shape[-1:], eps=EPS), shift, scale)


def kept_norm(tokens: Tensor, shift: Tensor, scale: Tensor, *, fused: bool = False) -> tuple[Tensor, Tensor]:
    """The tokens, with which the residual goes on, and `modulated_norm` of them; fused, their gradients meet there."""
    if fused and can_run(tokens.device) and torch.is_grad_enabled():
        from diffusion.models.kernels import fused as kernels

        return kernels.kept_norm(tokens, shift, scale, product_dtype(tokens))
    return tokens, modulated_norm(tokens, shift, scale, fused=fused)


def residual_norm(
    tokens: Tensor, update: Tensor, shift: Tensor, scale: Tensor, *, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Residual and the norm after it: tokens + update, and `modulated_norm` of that; both (B, N, D)."""
    if fused and can_run(tokens.device):
        from diffusion.models.kernels import fused as kernels

        return kernels.residual_norm(tokens, update, shift, scale, product_dtype(tokens))
    tokens = tokens + update
    return tokens, modulated_norm(tokens, shift, scale)


def gated_residual(tokens: Tensor, update: Tensor, gate: Tensor, *, fused: bool = False) -> Tensor:
    """tokens + gate * update in the precision of the tokens: (B, N, D), (B, N, D), (B, 1, D) -> (B, N, D)."""
    if fused and can_run(tokens.device):
        from diffusion.models.kernels import fused as kernels

        return kernels.gated_residual(tokens, update, gate)
    return (tokens + gate * update).to(tokens.dtype)


@custom_op("pixart::gelu_linear", mutates_args=())
def _gelu_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An operator of its own: the compiler takes torch's apart again."""
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)


@_gelu_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def gelu_mlp(tokens: Tensor, mlp: Any, *, fused: bool = False, form: str = "torch") -> Tensor:
    """Two linear layers with a GELU (tanh) between them: `Mlp`, (B, N, D) -> (B, N, D).

    Fused, its backward pass makes the GELU's output again, its gradient and that of the first bias in one pass, and
    keeps nothing of the GELU in between; on a card, where no gradient is asked for, the GELU is in the first product.
    `form` is `Kernels.mlp`; layers in FP8 have a form of their own.
    """
    if fused and tokens.device.type == "cpu" and torch.compiler.is_compiling() and is_tanh_gelu(mlp.act):
        hidden: Tensor = mlp.fc1(tokens)
        return mlp.fc2(_LogisticGelu.apply(hidden))
    is_plain = type(mlp.fc1) is nn.Linear and type(mlp.fc2) is nn.Linear
    if (fused or form != "torch") and is_plain and tokens.is_cuda and not torch.is_grad_enabled():
        return mlp.fc2(_gelu_product(tokens, mlp.fc1, form))
    if hasattr(mlp.fc2, "of_gelu") and is_tanh_gelu(mlp.act):  # in FP8, for drawing
        return mlp.fc2.of_gelu(mlp.fc1(tokens))
    if rounds_by_row(mlp.fc1) and rounds_by_row(mlp.fc2) and is_tanh_gelu(mlp.act) and can_run(tokens.device):
        from diffusion.models.kernels.fp8_mlp import gelu_mlp as compute
    elif form == "quack" and is_plain and tokens.is_cuda and product_dtype(tokens) != torch.float32:
        from diffusion.models.kernels.epilogues import gelu_mlp as compute
    elif fused and is_plain and can_run(tokens.device):
        from diffusion.models.kernels.fused import gelu_mlp as compute
    else:
        return mlp(tokens)
    dtype, parts = product_dtype(tokens), (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return compute(tokens.to(dtype), *(part.to(dtype) for part in parts))


def _gelu_product(tokens: Tensor, layer: nn.Linear, form: str) -> Tensor:
    """GELU (tanh) of a linear layer, (..., D_in) -> (..., D_out), in its product: QuACK's, or else cuBLAS's."""
    dtype, product = product_dtype(tokens), _gelu_linear
    if form == "quack" and dtype != torch.float32:
        from diffusion.models.kernels.epilogues import gelu_linear as product
    out: Tensor = product(tokens.to(dtype).flatten(0, -2), layer.weight.to(dtype), layer.bias.to(dtype))
    return out.unflatten(0, tokens.shape[:-1])


class _LogisticGelu(torch.autograd.Function):
    """GELU (tanh) as x * logistic(2 u), the same function: the compiler's exponential is faster than its tanh.

    Only the input is kept, and the backward pass needs one more exponential. In float32 for half precision.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return logistic_gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        wide = _wide(x)
        square = wide * wide
        logistic = torch.sigmoid(wide * (_GELU_SCALE + _GELU_CUBIC * square))
        slope = logistic * (1 + wide * (1 - logistic) * (_GELU_SCALE + 3 * _GELU_CUBIC * square))
        return (grad * slope).to(x.dtype)


def logistic_gelu(x: Tensor) -> Tensor:
    """GELU (tanh) by the logistic function."""
    wide = _wide(x)
    value = wide * torch.sigmoid(wide * (_GELU_SCALE + _GELU_CUBIC * wide * wide))
    return value if wide is x else value.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least. Not by a cast that does nothing: the compiler of torch 2.11 loses the gradient behind it."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def is_tanh_gelu(activation: nn.Module) -> bool:
    """Whether it is the GELU of PixArt's blocks, which the faster forms compute."""
    return isinstance(activation, nn.GELU) and activation.approximate == "tanh"
