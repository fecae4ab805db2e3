"""Linear layers in 8-bit floating point for drawing: lossy, faster on cards with FP8 products (Ada, Hopper, later).

Weights (e4m3) have a scale an output channel, made once; activations a scale a token, made in each pass: on a GPU in
one read, which takes in the GELU between two such layers. Weights are kept as bytes, so casting a network leaves them
alone.

Legend: M rows, K inputs, N outputs of a layer.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from diffusion.models import ControlPixArt, PixArt
from diffusion.models.kernels.availability import HAS_TRITON
from diffusion.models.kernels.fp8 import quantise, rounded, rounded_gelu

FORMAT = torch.float8_e4m3fn
FP8_LAYERS = ("attn.qkv", "mlp.fc1", "mlp.fc2")  # the others are too small: rounding costs what their products save


class Fp8Linear(nn.Module):
    """A linear layer with weight (N, K) and inputs rounded to FP8; sums and result have the inputs' higher precision.

    Where the device has no FP8 product the rounded values are multiplied in the inputs' dtype, which gives the same
    numbers up to the order of sums, slowly.
    """

    weight_bytes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight.detach(), by_row=True)
        self.register_buffer("weight_bytes", weight.view(torch.uint8))
        self.register_buffer("scale", scale)  # (N, 1) float32
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self._of_rounded(inputs, *rounded(inputs.flatten(0, -2), by_row=True))

    def of_gelu(self, inputs: Tensor) -> Tensor:
        """(..., K) -> (..., N) of the GELU (tanh) of the inputs."""
        return self._of_rounded(inputs, *rounded_gelu(inputs.flatten(0, -2)))

    def _of_rounded(self, inputs: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        weight = self.weight_bytes.view(FORMAT)
        if has_fp8_products(inputs.device):
            out = torch._scaled_mm(
                rows,
                weight.t(),
                scale_a=scale,
                scale_b=self.scale.float().t(),
                bias=None if self.bias is None else self.bias.to(torch.bfloat16),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ).to(inputs.dtype)
        else:
            out = (rows.float() * scale) @ (weight.float() * self.scale.float()).t()
            out = (out if self.bias is None else out + self.bias.float()).to(inputs.dtype)
        return out.unflatten(0, inputs.shape[:-1])


def has_fp8_products(device: torch.device) -> bool:
    """Whether a device multiplies FP8 with a scale a row: CUDA from compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_network(network: PixArt | ControlPixArt) -> int:
    """Replace the layers named in FP8_LAYERS of all blocks, a ControlNet's too; returns how many."""
    if HAS_TRITON:
        importlib.import_module("diffusion.models.kernels.fp8_rows")  # not while the compiler reads a block
    count = 0
    blocks = [*network.blocks] if isinstance(network, PixArt) else [*network.base_model.blocks]
    if isinstance(network, ControlPixArt):
        blocks += [block.copied_block for block in network.controlnet]
    for block in blocks:
        for path in FP8_LAYERS:
            owner, _, name = path.rpartition(".")
            parent = block.get_submodule(owner)
            setattr(parent, name, Fp8Linear(getattr(parent, name)))
            count += 1
    return count


def is_quantized(network: nn.Module) -> bool:
    return any(isinstance(module, Fp8Linear) for module in network.modules())
