"""Linear layers that are faster on a CPU: float32 products by oneDNN, and in drawing GELU in the same pass.

torch gives float32 products to MKL, which is the slower of the two on AMD processors. Layers keep their weights, their
names and all but the last bits of their output.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusion.models.kernels.elementwise import is_tanh_gelu
from diffusion.models.mlp import Mlp

Network = TypeVar("Network", bound=nn.Module)


class OneDNNLinear(nn.Linear):
    """`nn.Linear`; without gradients, on the CPU in float32, by oneDNN."""

    def forward(self, inputs: Tensor) -> Tensor:
        return _product(inputs, self.weight, self.bias) if _suits(self, inputs) else super().forward(inputs)


class OneDNNTrainingLinear(nn.Linear):
    """`nn.Linear`; on the CPU in float32 by oneDNN, with gradients or without, compiled or not."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not is_float32_on_cpu(self, inputs):
            return super().forward(inputs)
        outputs: Tensor = _linear(inputs, self.weight, self.bias)
        return outputs


class OneDNNMlp(Mlp):
    """`Mlp` whose GELU (tanh) is applied to the first product while that is in the cache."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not (type(self.fc1) is OneDNNLinear and _suits(self.fc1, inputs)):
            return super().forward(inputs)
        outputs: Tensor = self.fc2(_product(inputs, self.fc1.weight, self.fc1.bias, "gelu", "tanh"))
        return outputs


def use_onednn(network: Network, enabled: bool = True) -> Network:
    """Let the plain linear layers and MLPs of a network use oneDNN where it is faster; returns the network.

    Where torch has no oneDNN nothing changes. On other devices, in other precisions and with gradients the layers
    compute as they did; `enabled=False` makes them plain again, for code that looks for plain ones.
    """
    if not enabled:
        for module in network.modules():
            module.__class__ = _PLAIN.get(type(module), type(module))
        return network
    if not has_onednn():
        return network
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is Mlp and is_tanh_gelu(module.act):
            module.__class__ = OneDNNMlp
    return network


def train_with_onednn(network: Network) -> Network:
    """Let the plain linear layers of a network in training use oneDNN; returns the network. See `use_onednn`."""
    if has_onednn():
        for module in network.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNTrainingLinear
    return network


def has_onednn() -> bool:
    """Whether this torch was built with it."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _suits(layer: nn.Linear, inputs: Tensor) -> bool:
    # The compiler takes oneDNN's products of constant weights alone, and has products of its own.
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled()) and is_float32_on_cpu(layer, inputs)


def is_float32_on_cpu(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> bool:
    """Whether a layer with a weight of its own is to multiply float32 by float32 on a CPU."""
    if inputs.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return isinstance(layer.weight, nn.Parameter) and inputs.dtype == layer.weight.dtype == torch.float32


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", form: str = "") -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, activation, [], form)
    return product


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    OneDNNLinear: nn.Linear,
    OneDNNTrainingLinear: nn.Linear,
    OneDNNMlp: Mlp,
}


# ---- with gradients: an operator of its own, which the compiler calls as it is ----


@torch.library.custom_op("pixart::onednn_linear", mutates_args=())
def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(inputs, weight, bias)


@_linear.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, weight = ctx.saved_tensors
    rows = grad.flatten(0, -2)
    return (
        _linear(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
        rows.t() @ inputs.flatten(0, -2) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )


_linear.register_autograd(_backward, setup_context=_keep)
