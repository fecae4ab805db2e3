"""Nearest-neighbour upsampling and the convolution after it as one transposed convolution, with 4/9 of its products."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.models.cpu_linear import is_float32_on_cpu

# Along one direction: an input pixel has two copies side by side, and reaches four outputs by the sums of these taps.
_ALONG = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


class FoldedUpsample(Upsample2D):  # type: ignore[misc]
    """`Upsample2D` (twice as large, then 3 x 3); in float32 on a CPU without the large tensor between the two."""

    conv: Any

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) -> (B, O, 2H, 2W), or of `output_size`; the same but for the order of sums."""
        if output_size is not None or torch.compiler.is_compiling() or not self._suits(hidden_states):
            plain: Tensor = super().forward(hidden_states, output_size, *args, **kwargs)
            return plain
        kernel = transposed_kernel(self.conv.weight)
        return F.conv_transpose2d(hidden_states, kernel, self.conv.bias, stride=2, padding=1)

    def _suits(self, inputs: Tensor) -> bool:
        conv = self.conv
        # One that computes otherwise (strips of several processes, adapters) or has hooks is called as it is.
        changed = type(conv) is not nn.Conv2d or "forward" in vars(conv)
        if changed or conv._forward_hooks or conv._forward_pre_hooks:
            return False
        return is_float32_on_cpu(conv, inputs)


def transposed_kernel(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) of a convolution with padding 1 -> (I, O, 4, 4).

    A transposed convolution with it, stride 2 and padding 1 is that convolution of an input whose every pixel was made
    two by two. It is one small product, made anew for every call, and so never older than the weight.
    """
    both = torch.kron(_ALONG, _ALONG).to(weight)
    return (weight.reshape(-1, 9) @ both.T).view(*weight.shape[:2], 4, 4).transpose(0, 1)


def fold_upsampling(network: nn.Module) -> None:
    """Let the upsampling layers of a network compute so; weights, their names and what is saved stay as they are."""
    for module in network.modules():
        if type(module) is Upsample2D and _is_foldable(module):
            module.__class__ = FoldedUpsample


def _is_foldable(layer: Upsample2D) -> bool:
    conv = getattr(layer, "conv", None)
    if layer.norm is not None or not layer.interpolate or type(conv) is not nn.Conv2d:
        return False
    return (conv.kernel_size, conv.padding, conv.stride, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
