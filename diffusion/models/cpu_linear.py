"""Linear layers that draw faster on a CPU: float32 products by oneDNN, and GELU in the same pass.

torch gives float32 products to MKL, which is the slower of the two on AMD processors. Layers keep their weights, their
names and all but the last bits of their output.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from diffusion.models.mlp import Mlp

Network = TypeVar("Network", bound=nn.Module)


class OneDNNLinear(nn.Linear):
    """`nn.Linear`; without gradients, on the CPU in float32, by oneDNN."""

    def forward(self, inputs: Tensor) -> Tensor:
        return _product(self, inputs) if _suits(self, inputs) else super().forward(inputs)


class OneDNNMlp(Mlp):
    """`Mlp` whose GELU (tanh) is applied to the first product while that is in the cache."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not (type(self.fc1) is OneDNNLinear and _suits(self.fc1, inputs)):
            return super().forward(inputs)
        outputs: Tensor = self.fc2(_product(self.fc1, inputs, "gelu", "tanh"))
        return outputs


def use_onednn(network: Network, enabled: bool = True) -> Network:
    """Let the plain linear layers and MLPs of a network use oneDNN where it is faster; returns the network.

    Where torch has no oneDNN nothing changes. On other devices, in other precisions and with gradients the layers
    compute as they did; `enabled=False` makes them plain again, for code that looks for plain ones.
    """
    if not enabled:
        plain: dict[type[nn.Module], type[nn.Module]] = {OneDNNLinear: nn.Linear, OneDNNMlp: Mlp}
        for module in network.modules():
            module.__class__ = plain.get(type(module), type(module))
        return network
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return network
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is Mlp and isinstance(module.act, nn.GELU) and module.act.approximate == "tanh":
            module.__class__ = OneDNNMlp
    return network


def _suits(layer: nn.Linear, inputs: Tensor) -> bool:
    weight = layer.weight
    if torch.compiler.is_compiling():  # the compiler has products of its own
        return False
    if torch.is_grad_enabled() or inputs.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return type(weight) is nn.Parameter and inputs.dtype == weight.dtype == torch.float32


def _product(layer: nn.Linear, inputs: Tensor, activation: str = "none", form: str = "") -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, layer.weight, layer.bias, activation, [], form)
    return product
