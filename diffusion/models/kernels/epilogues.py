"""The feed-forward layer with its GELU inside the matrix products around it, by QuACK's kernels for Hopper cards.

Forward, the first product writes its output and the GELU of it; backward, the product that makes the gradient of the
GELU's output writes that of its input and the output again. So nothing reads or writes the widest activations for the
GELU's sake. The other products, and the sums of the biases' gradients, are torch's. In drawing, the first product
writes the GELU alone.
"""

from __future__ import annotations

from typing import Any

import torch
from quack.gemm_interface import gemm_act, gemm_dact
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

_GELU = "gelu_tanh_approx"


@custom_op("pixart::quack_gelu_linear", mutates_args=())
def gelu_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(rows weight^T + bias), (M, D) -> (M, K), without gradients; one half precision, sizes are multiples of 8."""
    _, activated = gemm_act(rows, weight.t(), bias=bias, activation=_GELU, store_preact=False, tuned=False)
    found: Tensor = activated
    return found


@gelu_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def gelu_mlp(tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """fc2(gelu(fc1(tokens))), (..., D) -> (..., D_out); one half precision, sizes are multiples of 8."""
    with torch.autocast(tokens.device.type, enabled=False):
        rows: Tensor = _GeluMLP.apply(tokens.flatten(0, -2), weight1, bias1, weight2, bias2)
    return rows.unflatten(0, tokens.shape[:-1])


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden, activated = gemm_act(rows, weight1.t(), bias=bias1, activation=_GELU, tuned=False)
        ctx.save_for_backward(rows, weight1, weight2, hidden)
        return F.linear(activated, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        rows, weight1, weight2, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden, activated = gemm_dact(grad, weight2, hidden, activation=_GELU, tuned=False)
        return (
            grad_hidden @ weight1,
            grad_hidden.t() @ rows,
            grad_hidden.sum(0, dtype=torch.float32).to(grad.dtype),
            grad.t() @ activated,
            grad.sum(0, dtype=torch.float32).to(grad.dtype),
        )
