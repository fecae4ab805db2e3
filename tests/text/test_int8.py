"""Linear layers in int8: their gradient, and what they keep for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.text.int8 import Int8Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_and_no_restored_weight_is_kept_for_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(64, 48).to(dtype))
    inputs = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(inputs)
    assert sorted(tensor.numel() for tensor in kept if tensor.is_floating_point()) == [48]  # the scales
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, inputs, gradient)
    plain = F.linear(inputs, layer.weight.to(dtype) * layer.scale, layer.bias)
    assert torch.equal(output, plain)
    assert torch.equal(found, torch.autograd.grad(plain, inputs, gradient)[0])
