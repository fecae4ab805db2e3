"""Adapters in a network and in files, against stock diffusers with peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from diffusion.adapters import (
    COMFYUI_WEIGHTS,
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    adapter_parameters,
    add_adapter,
    is_merged,
    layer_weights,
    merge,
    quantize_base,
    read_adapter,
    read_adapter_from,
    relative_norms,
    remove_adapters,
    set_scales,
    start_lora,
    unmerge,
    write_adapter,
)
from diffusion.checkpoints import save_transformer
from diffusion.errors import CheckpointError, ConfigError
from diffusion.models import PixArt

FILES = (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, COMFYUI_WEIGHTS)
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def network(**options: Any) -> PixArt:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_heads": 4, "depth": 2, "caption_channels": 32, "input_size": 8}
    made = PixArt(**{**sizes, "micro_condition": True, **options}).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def trained(base: PixArt, rank: int = 3, **options: Any) -> PixArt:
    """A copy of `base` with an adapter whose factors are not zero."""
    made = copy.deepcopy(base)
    start_lora(made, rank, alpha=6.0, **options)
    for name, parameter in adapter_parameters(made).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= 1.1
    return made


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([3.0, 500.0]),
        "caption_embeds": torch.randn(2, 5, 32, generator=generator),
        "img_hw": torch.tensor([[64.0, 64.0], [64.0, 64.0]]),
        "aspect_ratio": torch.ones(2),
    }


@torch.no_grad()
def output(model: PixArt) -> torch.Tensor:
    return model(**inputs())


def assert_same(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_changes_nothing_and_trains_alone(kind: str) -> None:
    base = network()
    made = copy.deepcopy(base)
    start_lora(made, 3, **KINDS[kind])
    assert_same(output(made), output(base))
    made(**inputs()).square().mean().backward()
    factors = adapter_parameters(made)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == set(factors)
    assert all(parameter.grad is not None for parameter in factors.values())
    assert len(read_adapter_from(made).layers) == len(layer_weights(base))  # every layer with a matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_every_file_gives_the_same_network(kind: str, file: str, tmp_path: Path) -> None:
    base = network()
    source = trained(base, **KINDS[kind])
    write_adapter(read_adapter_from(source), tmp_path)
    loaded = copy.deepcopy(base)
    add_adapter(loaded, read_adapter(tmp_path / file), "style")
    wanted = output(source)
    assert (wanted - output(base)).abs().max() > 0.1
    assert_same(output(loaded), wanted)
    merge(loaded, ["style"])
    assert_same(output(loaded), wanted)
    unmerge(loaded)
    assert_same(output(loaded), wanted)
    set_scales(loaded, {"style": 0.0})
    assert_same(output(loaded), output(base))
    set_scales(loaded, {"style": 1.0})
    merge(loaded, ["style"])
    remove_adapters(loaded)
    assert loaded.state_dict().keys() == base.state_dict().keys()
    assert_same(output(loaded), wanted)


def test_a_sum_that_is_not_finite_leaves_nothing_merged() -> None:
    base = network()
    source = trained(base)
    last = list(adapter_parameters(source).values())[-1]  # others are merged before it
    with torch.no_grad():
        last.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="cannot be merged"):
        merge(source, ["default"])
    assert not is_merged(source)
    with torch.no_grad():
        last.zero_()
    set_scales(source, {})
    assert_same(output(source), output(base))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_the_folder_on_stock_diffusers(kind: str, tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel
    from peft import PeftModel

    base = network()
    source = trained(base, **KINDS[kind])
    write_adapter(read_adapter_from(source), tmp_path / "lora")
    save_transformer(base, tmp_path / "transformer")
    stock = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
    model = PeftModel.from_pretrained(stock, str(tmp_path / "lora")).eval()
    given = inputs()
    conditions = {"resolution": given["img_hw"], "aspect_ratio": given["aspect_ratio"]}
    with torch.no_grad():
        drawn = model(
            given["latents"],
            encoder_hidden_states=given["caption_embeds"],
            timestep=given["timesteps"],
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
    assert_same(drawn, output(source))


def test_alpha_is_in_every_file(tmp_path: Path) -> None:
    write_adapter(read_adapter_from(trained(network(), rank=3)), tmp_path)
    assert json.loads((tmp_path / PEFT_CONFIG).read_text())["lora_alpha"] == 6
    for name in (DIFFUSERS_WEIGHTS, COMFYUI_WEIGHTS):
        tensors = load_file(tmp_path / name)
        assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {6.0}
    key = "transformer.transformer_blocks.1.attn1.to_q"
    assert tensors[f"{key}.lora_down.weight"].shape == (3, 48)
    assert tensors[f"{key}.lora_up.weight"].shape == (48, 3)


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_unet_", "lycoris_"])
def test_flattened_names_are_read(prefix: str, tmp_path: Path) -> None:
    base = network()
    source = trained(base)
    write_adapter(read_adapter_from(source), tmp_path)
    flat = {}
    for key, tensor in load_file(tmp_path / COMFYUI_WEIGHTS).items():
        layer, dot, rest = key.removeprefix("transformer.").rpartition(".lora_" if ".lora_" in key else ".alpha")
        flat[f"{prefix}{layer.replace('.', '_')}{dot}{rest}"] = tensor
    save_file(flat, tmp_path / "other.safetensors")
    loaded = copy.deepcopy(base)
    add_adapter(loaded, read_adapter(tmp_path / "other.safetensors"), "style")
    assert_same(output(loaded), output(source))


def test_several_adapters_add_up() -> None:
    base = network()
    adapters = [read_adapter_from(trained(base, rank)) for rank in (2, 3)]
    both = copy.deepcopy(base)
    for name, adapter in zip("ab", adapters):
        add_adapter(both, adapter, name)
    set_scales(both, {"a": 0.5, "b": 2.0})
    summed = copy.deepcopy(base)
    native = "blocks.0.mlp.fc1"
    name = "transformer_blocks.0.ff.net.0.proj"
    delta = 0.5 * adapters[0].layers[name].delta() + 2.0 * adapters[1].layers[name].delta()
    merge(both, ["a", "b"])
    remove_adapters(both)
    wanted = summed.get_submodule(native).weight + delta
    torch.testing.assert_close(both.get_submodule(native).weight, wanted)
    fused = both.blocks[0].attn.qkv.weight - base.blocks[0].attn.qkv.weight
    parts = [f"transformer_blocks.0.attn1.{part}" for part in ("to_q", "to_k", "to_v")]
    wanted = torch.cat([0.5 * adapters[0].layers[p].delta() + 2.0 * adapters[1].layers[p].delta() for p in parts])
    torch.testing.assert_close(fused, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_the_lean_way_is_pefts(dtype: torch.dtype) -> None:
    """Output and gradients of layers, at a scale, against peft's own class."""
    lean = trained(network(), 3)
    set_scales(lean, {"default": 0.7})
    for parameter in adapter_parameters(lean).values():
        parameter.requires_grad_()
    pefts = copy.deepcopy(lean)
    layers = [module for module in pefts.modules() if type(module).__name__ == "LeanLinear"]
    linears = [
        module for module in pefts.modules() if hasattr(module, "lora_A") and "Conv2d" not in type(module).__name__
    ]
    assert len(layers) == len(linears) > 20
    for module in layers:
        module.__class__ = type(module).__mro__[1]
    inputs = {"img_hw": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.ones(1)}
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([300.0]), torch.randn(1, 5, 32)
    found = []
    for model in (lean, pefts):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            output = model(*arguments, **inputs)
        output.float().square().mean().backward()
        found.append((output, {name: p.grad for name, p in adapter_parameters(model).items()}))
    tight = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(found[0][0], found[1][0], **tight)
    for name, gradient in found[0][1].items():
        close = gradient.norm() * (1e-4 if dtype is torch.float32 else 0.05)
        assert (gradient - found[1][1][name]).norm() <= close, name


def test_sums_ahead_are_of_the_blocks_own_layers_and_go_with_them() -> None:
    made = trained(network())
    twin = copy.deepcopy(made)
    for block in (made.blocks[1], twin.blocks[1]):
        (hook,) = block._forward_pre_hooks.values()
        layers = [layer for group in hook.__self__.groups for layer in group]
        assert [len(group) for group in hook.__self__.groups] == [3, 1, 1, 2, 1, 1, 1]
        assert all(any(layer is module for module in block.modules()) for layer in layers)
    remove_adapters(twin)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in twin.blocks)
    assert made.blocks[0]._forward_pre_hooks


@torch.no_grad()
def test_other_strengths_compile_nothing_anew() -> None:
    made = trained(network())
    strengths = (1.0, 0.5, 0.7, -0.2, 0.3, 0.8, 1.1, 0.1, 1.4, 0.6)

    def drawn(strength: float) -> torch.Tensor:
        set_scales(made, {"default": strength})
        return output(made)

    wanted = [drawn(strength) for strength in strengths]
    made.compile_blocks(dynamic=False, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for strength, expected in zip(strengths, wanted):
        assert_same(drawn(strength), expected)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_base_stays_close_and_trains(dtype: torch.dtype) -> None:
    """In bf16 without autocast too, as validation computes."""
    base = network().to(dtype)
    made = copy.deepcopy(base)
    start_lora(made, 3)
    count = quantize_base(made)
    assert count == len(layer_weights(base)) - 1  # all but the convolution of the patches
    assert made.blocks[0].attn.qkv.get_submodule("to_q").base_layer.weight.dtype is torch.int8
    difference = (output(made) - output(base)).norm() / output(base).norm()
    assert difference < 0.05
    made(**inputs()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(made).values())
    assert relative_norms(made, read_adapter_from(made)).keys() == layer_weights(base).keys()


def test_another_base_is_refused_with_names_and_sizes() -> None:
    adapter = read_adapter_from(trained(network()))
    sizes = r"another size.*pos_embed\.proj \(adapter \(48, 4, 2, 2\), model \(32, 4, 2, 2\)\)"
    with pytest.raises(CheckpointError, match=sizes):
        add_adapter(network(hidden_size=24 + 8, micro_condition=False), adapter, "style")
    names = r"width 48 and depth 1; .*lacks: transformer_blocks\.1\.attn1\.to_out\.0, "
    with pytest.raises(CheckpointError, match=names):
        add_adapter(network(depth=1), adapter, "style")


@pytest.mark.parametrize("rank", [0, -1, 49])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank={rank} must be between 1 and the model's width 48"):
        start_lora(network(), rank)


def test_files_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no LoRA of a transformer: weight"):
        read_adapter(tmp_path / "x.safetensors")
    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({key: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"to_q without up factor"):
        read_adapter(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"no readable safetensors file"):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent does not exist"):
        read_adapter(tmp_path / "absent")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["launched", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16 base", "fp32 base"])
def test_factors_train_by_the_sum_of_weights_as_exactly_on_a_gpu(compiled: bool, dtype: torch.dtype) -> None:
    made = trained(network(hidden_size=288, input_size=32).to(dtype).float(), rank=5).cuda()
    given = {
        "latents": torch.randn(2, 4, 32, 32),
        "timesteps": torch.tensor([3.0, 500.0]),
        "caption_embeds": torch.randn(2, 70, 32),
        "img_hw": torch.full((2, 2), 256.0),
        "aspect_ratio": torch.ones(2),
    }
    given = {name: value.cuda() for name, value in given.items()}

    def gradients(model: PixArt) -> torch.Tensor:
        output = model(**{name: value.to(next(model.parameters()).dtype) for name, value in given.items()})
        leaves = list(adapter_parameters(model).values())
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(output.double().square().mean(), leaves)])

    exact = gradients(copy.deepcopy(made).double())
    for layer in made.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
            layer.to(dtype)
    if compiled:
        made.compile_blocks(dynamic=False)
    errors = []
    for takes in (False, True):
        with pytest.MonkeyPatch.context() as patched, torch.autocast("cuda", torch.bfloat16):
            if not takes:
                patched.setattr("diffusion.adapters.lean.takes_sum", lambda *_: False)
            torch._dynamo.reset()
            errors.append(((gradients(made) - exact).norm() / exact.norm()).item())
    assert errors[1] < 1.5 * errors[0]
    assert errors[1] != errors[0]  # it was taken
