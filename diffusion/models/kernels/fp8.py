"""Linear layers with 8-bit floating-point products in training. Lossy: an option, never a default.

Forward pass and gradient of the input are FP8 products; the gradient of the weight stays in bfloat16, as its sum over
all tokens is what rounding harms most. Weights, optimiser and checkpoints stay as they are. Scales are made from the
values themselves, by row (all e4m3) or by tensor (gradients in e5m2), see "FP8 Formats for Deep Learning"
(arXiv:2209.05433). Weights are rounded in plain torch; activations and gradients by row, on a GPU, in a Triton kernel
(`fp8_rows.py`), and the feed-forward layer there has a form of its own (`fp8_mlp.py`).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.models.kernels.availability import HAS_TRITON, can_run

RECIPES = ("rowwise", "tensorwise")
_MOST_COLUMNS = 8192  # that fit into the registers of a program
# All that multiply image tokens.
FP8_LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2")


def use_fp8(network: nn.Module, recipe: str, layers: tuple[str, ...] = FP8_LAYERS) -> int:
    """Let linear layers of a network's blocks compute in FP8; parameters stay the same objects. Returns how many.

    Args:
        recipe: "rowwise" or "tensorwise".
        layers: ends of module names inside blocks.
    Raises:
        ValueError: an unknown recipe, no such layer, or one whose sizes 16 does not divide.
    """
    if recipe not in RECIPES:
        raise ValueError(f"fp8={recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    chosen = {
        name: module
        for name, module in network.named_modules()
        if "blocks." in name and name.endswith(layers) and type(module) is nn.Linear
    }
    if not chosen:
        raise ValueError(f"fp8: no linear layer of the network ends in {', '.join(layers)}; adapters keep their own")
    for name, layer in chosen.items():
        if layer.in_features % 16 or layer.out_features % 16:
            raise ValueError(f"fp8: {name} has {layer.in_features} x {layer.out_features} weights, not multiples of 16")
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, FP8Linear.of(layer, recipe))
    importlib.import_module("diffusion.models.kernels.fp8_mlp")  # not while the compiler reads a block
    if HAS_TRITON:
        importlib.import_module("diffusion.models.kernels.qkv")
    return len(chosen)


class FP8Linear(nn.Linear):
    """A linear layer whose products with activations and their gradients are in FP8."""

    recipe = "rowwise"

    @classmethod
    def of(cls, layer: nn.Linear, recipe: str) -> FP8Linear:
        """The same parameters, computing in FP8."""
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        new.weight, new.bias, new.recipe = layer.weight, layer.bias, recipe
        return new.train(layer.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out) in autocast's precision, or that of the tokens."""
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            out: Tensor = _Product.apply(tokens.to(dtype), self.weight.to(dtype), bias, self.recipe == "rowwise")
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, by_row: bool) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.by_row, ctx.has_bias = by_row, bias is not None
        rows, rows_scale = rounded(tokens.flatten(0, -2), by_row)
        columns, columns_scale = quantise(weight, by_row)
        out = scaled_product(rows, columns, rows_scale, columns_scale, bias, tokens.dtype, fast=True)
        return out.unflatten(0, tokens.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        grad = grad_out.flatten(0, -2)
        if ctx.by_row:
            rows, rows_scale, grad_bias = rounded_with_sum(grad)
        else:
            rows, rows_scale = quantise(grad, False, torch.float8_e5m2)
            grad_bias = grad.sum(0, dtype=torch.float32)
        columns, columns_scale = quantise(weight.t().contiguous(), ctx.by_row)
        grad_tokens = scaled_product(rows, columns, rows_scale, columns_scale, None, tokens.dtype, fast=False)
        grad_weight = grad.t() @ tokens.flatten(0, -2)
        return grad_tokens.view_as(tokens), grad_weight, grad_bias.to(grad.dtype) if ctx.has_bias else None, None


def rounded(values: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """`quantise`, of many rows on a GPU in a pass of its own, which is faster than what the compiler makes of it."""
    if by_row and _in_one_pass(values):
        from diffusion.models.kernels.fp8_rows import rounded_rows

        return rounded_rows(values)
    return quantise(values, by_row)


def rounded_gelu(values: Tensor) -> tuple[Tensor, Tensor]:
    """`rounded` by row, of the GELU (tanh) of (M, K): on a GPU both in one pass."""
    if _in_one_pass(values):
        from diffusion.models.kernels.fp8_rows import rounded_rows

        return rounded_rows(values, True)
    return quantise(F.gelu(values, approximate="tanh"), by_row=True)


def rounded_with_sum(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rounded` by row, and the sum over all rows, (K,) float32: on a GPU both in one pass."""
    if _in_one_pass(values):
        from diffusion.models.kernels.fp8_rows import rounded_and_summed

        rows, scale, sums = rounded_and_summed(values)
        return rows, scale, sums.sum(0)
    return *quantise(values, by_row=True), values.sum(0, dtype=torch.float32)


def _in_one_pass(values: Tensor) -> bool:
    """Whether the kernels of `fp8_rows.py` run there, and a row fits into a program."""
    return can_run(values.device) and values.shape[1] <= _MOST_COLUMNS


def quantise(values: Tensor, by_row: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """(M, K) -> FP8 values (M, K) and the float32 scale, (M, 1) or (), that they are to be multiplied by."""
    largest = values.abs().amax(1, keepdim=True) if by_row else values.abs().amax()
    scale = largest.float().clamp(min=1e-12) / torch.finfo(dtype).max
    limit = torch.finfo(dtype).max
    return (values.float() / scale).clamp(-limit, limit).to(dtype), scale


def scaled_product(
    rows: Tensor, columns: Tensor, rows_scale: Tensor, columns_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    *, fast: bool,
) -> Tensor:  # fmt: skip
    """(M, K) and (N, K) in FP8 -> (M, N) in `dtype`; emulated in float32 where there is no FP8 unit.

    fast: sums in the tensor cores' own precision, which is below float32's.
    """
    if rows.is_cuda:
        scales = {"scale_a": rows_scale, "scale_b": columns_scale.t() if columns_scale.ndim else columns_scale}
        return torch._scaled_mm(rows, columns.t(), bias=bias, out_dtype=dtype, use_fast_accum=fast, **scales)
    out = (rows.float() * rows_scale) @ (columns.float() * columns_scale).t()
    return (out if bias is None else out + bias.float()).to(dtype)


def product_by_row(
    rows: tuple[Tensor, Tensor], columns: Tensor, bias: Tensor | None, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """`scaled_product` of rows that are rounded, and their scales, with columns (N, K) that are rounded here."""
    rounded_columns, scale = quantise(columns, by_row=True)
    return scaled_product(rows[0], rounded_columns, rows[1], scale, bias, dtype, fast=fast)


def gradient_by_row(rows: tuple[Tensor, Tensor], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a layer's inputs, (M, K): of its outputs, (M, N), rounded and with their scales, and its weight
    (N, K)."""
    return product_by_row(rows, weight.t().contiguous(), None, dtype, fast=False)


def rounds_by_row(layer: nn.Module) -> bool:
    """Whether a layer computes in FP8 with a scale for each row."""
    return type(layer) is FP8Linear and layer.recipe == "rowwise"
