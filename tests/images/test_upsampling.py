from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch import nn

from diffusion.images import load_vae
from diffusion.images.upsampling import FoldedUpsample, fold_upsampling
from tests.tiny import tiny_vae


def layer(**options: object) -> Upsample2D:
    torch.manual_seed(0)
    return Upsample2D(6, **{"use_conv": True, "out_channels": 10, **options})


def folded(plain: nn.Module) -> nn.Module:
    fold_upsampling(other := copy.deepcopy(plain))
    return other


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 8), (16, 3)])
def test_a_folded_layer_is_as_near_to_the_exact_result(height: int, width: int, bias: bool) -> None:
    """At the borders too, where the plain layer pads what it made large."""
    plain = layer(bias=bias)
    ours, exact = folded(plain), copy.deepcopy(plain).double()
    assert type(ours) is FoldedUpsample
    inputs = torch.randn(2, 6, height, width)
    given, outputs = [], []
    for module, x in ((ours, inputs), (plain, inputs), (exact, inputs.double())):
        given.append(x.clone().requires_grad_())
        outputs.append(module(given[-1]))
        outputs[-1].square().sum().backward()
    assert outputs[0].shape == (2, 10, 2 * height, 2 * width)
    for values in (outputs, [x.grad for x in given], [module.conv.weight.grad for module in (ours, plain, exact)]):
        error, plain_error = ((value.double() - values[2]).norm() / values[2].norm() for value in values[:2])
        assert error <= max(1.5 * plain_error, 3e-7)


def test_it_follows_its_weights() -> None:
    ours = folded(layer())
    inputs = torch.randn(1, 6, 4, 4)
    before = ours(inputs)
    with torch.no_grad():
        ours.conv.weight.mul_(2)
        ours.conv.bias.mul_(2)
    assert torch.allclose(ours(inputs), 2 * before, rtol=1e-5, atol=1e-6)


def test_a_convolution_that_was_changed_is_called() -> None:
    """Several processes that share a picture give convolutions another forward; offloading hangs hooks onto them."""
    plain, inputs, seen = layer(), torch.randn(1, 6, 4, 5), []
    ours = folded(plain)
    hook = ours.conv.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    assert torch.equal(ours(inputs), plain(inputs)) and seen == [(1, 6, 8, 10)]
    hook.remove()
    ours.conv.forward = lambda given: given + 1
    assert torch.equal(ours(inputs), nn.functional.interpolate(inputs, scale_factor=2.0) + 1)
    del ours.conv.forward
    assert torch.allclose(ours(inputs), plain(inputs), atol=1e-5) and not torch.equal(ours(inputs), plain(inputs))


def test_other_precisions_sizes_and_layers_are_computed_as_before() -> None:
    plain, inputs = layer(), torch.randn(1, 6, 4, 5)
    assert torch.equal(folded(plain)(inputs, (7, 9)), plain(inputs, (7, 9)))
    assert torch.equal(folded(plain).bfloat16()(inputs.bfloat16()), copy.deepcopy(plain).bfloat16()(inputs.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded(plain)(inputs), plain(inputs))
    kinds = [{"use_conv": False}, {"use_conv_transpose": True}, {"kernel_size": 5}, {"interpolate": False}]
    for other in [*(layer(**options) for options in kinds), layer(norm_type="rms_norm", eps=1e-6)]:
        assert type(folded(other)) is Upsample2D


def test_a_loaded_vae_is_folded_and_saved_as_it_was(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path / "vae")
    assert any(type(module) is FoldedUpsample for module in vae.decoder.modules())
    vae.save_pretrained(tmp_path / "again")
    stock = AutoencoderKL.from_pretrained(str(tmp_path / "again"))
    assert not any(type(module) is FoldedUpsample for module in stock.modules())
    latents = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        assert torch.allclose(vae.decode(latents).sample, stock.decode(latents).sample, atol=1e-5)
