"""Linear layers in FP8: near to what they round, exact where they do not, and on a card as emulated."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion.config.schema_kernels import KernelsConfig
from diffusion.models.kernels import FP8_LAYERS, FP8Linear, use_fp8
from diffusion.models.kernels.fp8 import quantise
from tests.models.test_kernels import gpu, network


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_fp8_products_are_near_and_the_weight_gradient_is_exact(recipe: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 96)
    low = FP8Linear.of(layer, recipe)
    assert low.weight is layer.weight
    tokens, grad = torch.randn(2, 50, 64), torch.randn(2, 50, 96)
    each = []
    for module in (low, layer):
        leaf = tokens.clone().requires_grad_()
        output = module(leaf)
        each.append([output, *torch.autograd.grad(output, [leaf, module.weight, module.bias], grad)])
    ours, exact = each
    for index in (0, 1):
        error = (ours[index] - exact[index]).norm() / exact[index].norm()
        assert 1e-3 < error < 0.06  # e4m3 has 3 bits after the point, e5m2 has 2
    torch.testing.assert_close(ours[2:], exact[2:])


@gpu
@pytest.mark.parametrize("padded", [72, 96])
def test_gradients_are_rounded_on_a_card_as_in_plain_torch(padded: int) -> None:
    from diffusion.models.kernels import fp8_rows  # needs Triton

    torch.manual_seed(0)
    # Numbers of rows and columns that fill no program.
    grad, hidden = torch.randn(2, 70, 4 * 216, device="cuda").bfloat16()
    q, k, v = torch.randn(3, 70, 3, padded, device="cuda").bfloat16()
    joined = torch.cat([part[..., :72].flatten(1) for part in (q, k, v)], 1)
    leaf = hidden.float().requires_grad_()
    activated = F.gelu(leaf, approximate="tanh")
    (grad_hidden,) = torch.autograd.grad(activated, leaf, grad.float())
    found = {
        "plain": (grad, *fp8_rows.rounded_and_summed(grad)),
        "joined": (joined, *fp8_rows.rounded_join(q, k, v, 72)[1:]),
        "gelu": (grad_hidden, *fp8_rows.rounded_gelu_gradients(grad, hidden)[2:]),
    }
    for name, (values, rounded, scales, sums) in found.items():
        wanted, wanted_scales = quantise(values, by_row=True)
        torch.testing.assert_close(scales, wanted_scales, rtol=1e-4, atol=0, msg=name)
        near = (rounded.float() == wanted.float()).float().mean()
        assert near > 0.999, (name, near)  # numbers half-way between two may go either way
        torch.testing.assert_close(sums.sum(0), values.float().sum(0), rtol=1e-4, atol=1e-4, msg=name)
    assert torch.equal(fp8_rows.rounded_join(q, k, v, 72)[0], joined)
    for ours, exact in zip(fp8_rows.rounded_gelu_gradients(grad, hidden), (activated, grad_hidden)):
        torch.testing.assert_close(ours.float(), exact, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_a_row_of_zeros_stays_zero_in_fp8(recipe: str) -> None:
    low = FP8Linear.of(nn.Linear(16, 16, bias=False), recipe)
    tokens = torch.zeros(3, 16, requires_grad=True)
    low(tokens).sum().backward()
    assert torch.isfinite(tokens.grad).all()  # type: ignore[arg-type]
    assert low(tokens).abs().max() == 0


def test_fp8_changes_the_named_layers_alone_and_no_weights() -> None:
    model = network()
    before = dict(model.named_parameters())
    assert use_fp8(model, "rowwise") == 12  # six of each of two blocks
    assert type(model.blocks[1].mlp.fc2) is FP8Linear
    assert type(model.blocks[1].cross_attn.kv_linear) is nn.Linear
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_a_config_has_the_layers_of_the_kernels_as_its_default() -> None:
    assert KernelsConfig().fp8_layers == FP8_LAYERS


def test_fp8_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        use_fp8(network(hidden_size=40, num_heads=4), "rowwise")
    with pytest.raises(ValueError, match="no linear layer"):
        use_fp8(network(), "rowwise", ("mlp.fc3",))
    with pytest.raises(ValueError, match="fp8='nearest' is unknown"):
        use_fp8(network(), "nearest")


@gpu
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_fp8_units_compute_what_is_emulated(recipe: str) -> None:
    torch.manual_seed(0)
    layer = FP8Linear.of(nn.Linear(128, 256), recipe).bfloat16()
    tokens = torch.randn(64, 128, dtype=torch.bfloat16)
    emulated = layer(tokens)
    torch.testing.assert_close(layer.cuda()(tokens.cuda()).cpu(), emulated, rtol=2e-2, atol=2e-2)
