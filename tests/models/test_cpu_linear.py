"""Faster linear layers of the CPU against the plain ones and float64; MLP and stochastic depth against timm's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm.layers
import torch
from torch import nn

from diffusion.models import PixArt
from diffusion.models.cpu_linear import (
    OneDNNLinear,
    OneDNNMlp,
    OneDNNTrainingLinear,
    has_onednn,
    train_with_onednn,
    use_onednn,
)
from diffusion.models.embeddings import ApproxGelu
from diffusion.models.mlp import DropPath, Mlp
from tests.inference.tiny_pipeline import load_quietly, write_tiny_pipeline

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


def network() -> PixArt:
    torch.manual_seed(0)
    model = PixArt(hidden_size=48, num_heads=4, depth=2, caption_channels=32, input_size=8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=dtype)
    embeds = torch.randn(2, 7, 32, generator=generator, dtype=dtype)
    return latents, torch.tensor([500.0, 20.0]), embeds, torch.arange(7) < torch.tensor([[7], [3]])


@needs_onednn
@torch.no_grad()
def test_it_is_as_near_to_float64_as_the_plain_network() -> None:
    plain = network()
    fast, exact = use_onednn(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    assert sum(type(module) is OneDNNLinear for module in fast.modules()) > 10
    assert sum(type(module) is OneDNNMlp for module in fast.modules()) == 3  # of two blocks, and of the captions
    # An input that the float64 network reads as it is: its own rounding of float32 noise would count as an error.
    truth = exact(*(part.double() if part.is_floating_point() else part for part in inputs()))
    wanted, given = ((model(*inputs()) - truth).norm() / truth.norm() for model in (plain, fast))
    assert given < max(1.5 * wanted, 5e-7)
    assert given < 1e-5


@needs_onednn
def test_weights_names_and_training_stay() -> None:
    plain = network()
    fast = use_onednn(copy.deepcopy(plain))
    assert list(fast.state_dict()) == list(plain.state_dict())
    for model in (plain, fast):  # with gradients the layers are torch's own
        model(*inputs()).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), fast.parameters()))
    with torch.no_grad():  # and in other precisions
        low = [copy.deepcopy(model).bfloat16()(*inputs()) for model in (plain, fast)]
    assert torch.equal(*low)


def gradients(model: PixArt, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Output and the gradients of all weights and of the captions."""
    latents, timesteps, embeds, mask = inputs()
    embeds = embeds.to(dtype).requires_grad_()
    output = model(latents.to(dtype), timesteps.to(dtype), embeds, mask)
    return [output, *torch.autograd.grad(output.square().mean(), [embeds, *model.parameters()])]


def error(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact) if b.norm() > 1e-9)


@needs_onednn
@pytest.mark.parametrize("how", ["eager", "compiled", "recomputed"])
def test_training_is_as_near_to_float64_as_the_plain_network(how: str) -> None:
    plain = network()
    fast, exact = train_with_onednn(copy.deepcopy(plain)), gradients(copy.deepcopy(plain).double(), torch.float64)
    assert sum(type(module) is OneDNNTrainingLinear for module in fast.modules()) > 10
    assert list(fast.state_dict()) == list(plain.state_dict())
    if how == "compiled":
        fast.compile_blocks(backend="aot_eager")
    elif how == "recomputed":
        fast.train().enable_gradient_checkpointing(selective=True)
    ours, wanted = gradients(fast), gradients(plain)
    assert not torch.equal(ours[0], wanted[0])
    assert error(ours, exact) < max(1.5 * error(wanted, exact), 1e-6)


@needs_onednn
def test_frozen_weights_get_no_gradient_and_other_precisions_are_torchs() -> None:
    plain, fast = nn.Linear(8, 6), train_with_onednn(nn.Linear(8, 6))
    fast.load_state_dict(plain.state_dict())
    fast.weight.requires_grad_(False)
    rows = torch.randn(3, 5, 8, requires_grad=True)
    fast(rows).sum().backward()
    assert fast.weight.grad is None
    torch.testing.assert_close(fast.bias.grad, torch.full((6,), 15.0))
    torch.testing.assert_close(rows.grad, plain.weight.sum(0).expand(3, 5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(rows), plain(rows))
    assert torch.equal(fast.double()(rows.double()), plain.double()(rows.double()))


@needs_onednn
def test_layers_become_plain_again() -> None:
    plain = network()
    trained = train_with_onednn(copy.deepcopy(plain))
    assert [type(module) for module in use_onednn(trained, enabled=False).modules()] == [
        type(module) for module in plain.modules()
    ]
    back = use_onednn(use_onednn(copy.deepcopy(plain)), enabled=False)
    assert [type(module) for module in back.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        assert torch.equal(back(*inputs()), plain(*inputs()))


@needs_onednn
def test_a_loaded_pipeline_has_them_until_it_leaves_the_cpu(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "model")
    pipeline = load_quietly(folder)
    assert type(pipeline.transformer.blocks[0].mlp) is OneDNNMlp
    pipeline.to("meta")
    assert type(pipeline.transformer.blocks[0].mlp) is Mlp
    given = network()
    load_quietly(folder, transformer=given)
    assert type(given.blocks[0].mlp) is Mlp  # a network in training is not touched by its validation


@needs_onednn
def test_other_layers_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = use_onednn(nn.Sequential(Special(4, 4), Mlp(4, 8, act_layer=nn.GELU)))
    assert type(model[0]) is Special
    assert type(model[1]) is Mlp  # its GELU is not the tanh form
    plain = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        wanted = plain(torch.ones(2, 4))
        assert torch.allclose(use_onednn(plain)(torch.ones(2, 4)), wanted)
    assert type(plain) is OneDNNLinear


def test_mlp_is_timms() -> None:
    torch.manual_seed(0)
    ours = Mlp(12, hidden_features=24, out_features=6, act_layer=ApproxGelu)
    torch.manual_seed(0)
    theirs = timm.layers.Mlp(12, hidden_features=24, out_features=6, act_layer=ApproxGelu)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))  # the same first draws
    tokens = torch.randn(2, 5, 12)
    assert torch.equal(ours(tokens), theirs(tokens))


def test_stochastic_depth_is_timms() -> None:
    branch = torch.ones(64, 3, 2)
    torch.manual_seed(0)
    ours = DropPath(0.25).train()(branch)
    torch.manual_seed(0)
    assert torch.equal(ours, timm.layers.DropPath(0.25).train()(branch))
    assert 0 < (ours[:, 0, 0] == 0).sum() < 40
    assert torch.equal(DropPath(0.25).eval()(branch), branch)
