"""FP8 layers: rounding as the format has it, and a picture near the exact one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion.inference.fp8 import FORMAT, FP8_LAYERS, Fp8Linear, has_fp8_products, quantize_network
from diffusion.models import ControlPixArt
from diffusion.models.kernels import gelu_mlp
from diffusion.models.kernels.fp8 import quantise
from tests.inference.tiny_pipeline import tiny_transformer


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_are_rounded_to_three_bits() -> None:
    rows = values(7, 64) * torch.logspace(-6, 6, 7)[:, None]
    quantized, scale = quantise(rows, by_row=True)
    restored = quantized.float() * scale
    assert quantized.dtype == FORMAT
    largest = rows.abs().amax(1)
    torch.testing.assert_close(restored.abs().amax(1), largest)  # the largest of a row is exact
    # Half a unit in the last of 3 mantissa bits; below the smallest normal number (2^-6) the error is absolute.
    error = (restored - rows).abs()
    assert (error <= torch.maximum(rows.abs() * 2**-4, scale * 2**-10) * 1.001).all()


def test_a_row_of_zeros_stays_zero() -> None:
    quantized, scale = quantise(torch.zeros(2, 8), by_row=True)
    assert torch.equal(quantized.float() * scale, torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_the_rounded_values(dtype: torch.dtype) -> None:
    linear = nn.Linear(32, 48).to(dtype)
    layer = Fp8Linear(linear)
    inputs = values(2, 5, 32).to(dtype)
    rows, scale = quantise(inputs.flatten(0, 1), by_row=True)
    weight, weight_scale = quantise(linear.weight.detach(), by_row=True)
    by_hand = (rows.double() * scale) @ (weight.double() * weight_scale).t() + linear.bias.detach().double()
    found = layer(inputs)
    assert found.dtype == dtype and found.shape == (2, 5, 48)
    torch.testing.assert_close(found.double().flatten(0, 1), by_hand, atol=1e-2, rtol=1e-2)
    exact = linear(inputs).double()
    assert 0 < (found.double() - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gelu_before_a_layer_is_rounded_with_its_inputs(dtype: torch.dtype) -> None:
    layer, inputs = Fp8Linear(nn.Linear(32, 48).to(dtype)), values(2, 5, 32).to(dtype)
    found, wanted = layer.of_gelu(inputs), layer(nn.functional.gelu(inputs, approximate="tanh"))
    assert torch.equal(found, wanted)
    mlp = tiny_transformer(depth=1).to(dtype).blocks[0].mlp
    tokens = values(1, 3, mlp.fc1.in_features).to(dtype)
    exact = mlp(tokens)
    mlp.fc1, mlp.fc2 = Fp8Linear(mlp.fc1), Fp8Linear(mlp.fc2)
    found = gelu_mlp(tokens, mlp)
    assert torch.equal(found, mlp(tokens))
    assert 0 < (found - exact).norm() / exact.norm() < 0.06


def test_bytes_survive_a_cast_of_the_network() -> None:
    layer, inputs = Fp8Linear(nn.Linear(32, 16)), values(3, 32)
    before = layer(inputs)
    torch.testing.assert_close(layer.bfloat16()(inputs.bfloat16()).float(), before, atol=3e-2, rtol=3e-2)
    assert layer.weight_bytes.dtype == torch.uint8


def test_the_named_layers_of_all_blocks_are_replaced() -> None:
    network = tiny_transformer(depth=3)
    assert quantize_network(ControlPixArt(network, 2)) == 5 * len(FP8_LAYERS)
    assert all(isinstance(block.get_submodule(path), Fp8Linear) for block in network.blocks for path in FP8_LAYERS)
    assert type(network.blocks[0].cross_attn.kv_linear) is nn.Linear


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_the_card_gives_what_the_emulation_gives() -> None:
    device = torch.device("cuda")
    if not has_fp8_products(device):
        pytest.skip("needs a card with FP8 products")
    layer, inputs = Fp8Linear(nn.Linear(1152, 3456).bfloat16()), values(512, 1152).bfloat16()
    emulated = layer(inputs).float()
    found = layer.to(device)(inputs.to(device)).float().cpu()
    assert (found - emulated).norm() / emulated.norm() < 5e-3
    plain = layer(nn.functional.gelu(inputs.to(device), approximate="tanh"))
    assert (layer.of_gelu(inputs.to(device)) - plain).norm() / plain.norm() < 2e-2  # whose GELU is rounded to bfloat16
