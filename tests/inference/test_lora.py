"""Adapters in the pipeline and through scripts/inference.py and tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.adapters import COMFYUI_WEIGHTS, adapter_parameters, read_adapter_from, start_lora, write_adapter
from diffusion.checkpoints import save_transformer
from diffusion.errors import CheckpointError, PromptError
from diffusion.inference import PixArtPipeline, make_scheduler, memory
from diffusion.inference.recipe import read_recipe
from diffusion.models import PixArt
from diffusion.models.cpu_linear import use_onednn
from tests.doors import Door
from tests.inference.tiny_pipeline import WholeVisitorInBlocks, load_quietly, write_tiny_adapter
from tests.tiny import write_tiny_pipeline_parts

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipe`, a tiny pipeline with weights that are not zero, and `lora`, an adapter of it."""
    root = tmp_path_factory.mktemp("lora")
    write_tiny_pipeline_parts(root / "pipe")
    make_scheduler("dpm-solver").save_pretrained(root / "pipe/scheduler")
    torch.manual_seed(0)
    network = PixArt(input_size=4, hidden_size=32, num_heads=2, depth=1, caption_channels=32)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_transformer(network, root / "pipe/transformer")
    start_lora(network, 2)
    for parameter in adapter_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.1)
    write_adapter(read_adapter_from(network), root / "lora")
    return root


@pytest.fixture
def pipe(folder: Path) -> PixArtPipeline:
    made = PixArtPipeline.from_pretrained(folder / "pipe")
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: PixArtPipeline, **given: Any) -> Tensor:
    given = given or {"prompt": "a red apple"}
    return pipe(**given, seed=0, num_inference_steps=2, output_type="latent").images


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_load_weigh_fuse_and_unload(pipe: PixArtPipeline, folder: Path) -> None:
    base = draw(pipe)
    pipe.load_lora_weights(folder / "lora", "style")
    styled = draw(pipe)
    assert (styled - base).abs().max() > 0.01
    pipe.set_adapters("style", 0.0)
    assert_same(draw(pipe), base)
    pipe.set_adapters("style")
    pipe.disable_lora()
    assert_same(draw(pipe), base)
    pipe.enable_lora()
    assert_same(draw(pipe), styled)
    pipe.fuse_lora()
    assert_same(draw(pipe), styled)
    pipe.unfuse_lora()
    assert_same(draw(pipe), styled)
    pipe.unload_lora_weights()
    assert_same(draw(pipe), base)
    assert pipe.get_list_adapters() == []


CHANGES: dict[str, Any] = {
    "loaded": lambda pipe, adapter: pipe.load_lora_weights(adapter, "style"),
    "weaker": lambda pipe, adapter: pipe.set_adapters("style", 0.5),
    "fused": lambda pipe, adapter: pipe.fuse_lora(),
    "unfused": lambda pipe, adapter: pipe.unfuse_lora(),
    "removed": lambda pipe, adapter: pipe.unload_lora_weights(),
    "loaded again": lambda pipe, adapter: pipe.load_lora_weights(adapter),
    "fused again": lambda pipe, adapter: pipe.fuse_lora(2.0),
    "fused for good": lambda pipe, adapter: pipe.unload_lora_weights(),
}


@pytest.fixture(params=[False, True], ids=["whole", "in blocks"])
def visitors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that move as on a CPU, and in blocks of host memory as on a card."""
    if request.param:
        monkeypatch.setattr(memory, "WholeVisitor", WholeVisitorInBlocks)


@pytest.mark.usefixtures("visitors")
@pytest.mark.parametrize("plan", ["full", "4gb"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_memory_plan_draws_the_same_bits_at_every_change_of_adapters(folder: Path, plan: str, device: str) -> None:
    planned, free = load_quietly(folder / "pipe"), load_quietly(folder / "pipe")
    planned.set_memory_plan(plan, device)
    drawn = {}
    for name, change in CHANGES.items():
        change(planned, folder / "lora")
        change(free.to("cpu"), folder / "lora")  # where a plan has the network changed
        drawn[name] = draw(planned)
        assert torch.equal(drawn[name], draw(free.to(device))), name
    assert (drawn["fused for good"] - drawn["removed"]).abs().max() > 0.01


@pytest.mark.usefixtures("visitors")
@pytest.mark.parametrize("device", DEVICES)
def test_the_base_comes_back_bit_for_bit_under_a_memory_plan(folder: Path, tmp_path: Path, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load_quietly(folder / "pipe", torch_dtype=dtype)
        pipe.set_memory_plan("full", device)
        base = draw(pipe)
        pipe.load_lora_weights(folder / "lora")
        assert not torch.equal(draw(pipe), base)
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), base)
        with pytest.raises(CheckpointError, match="was made for another model"):
            pipe.load_lora_weights(write_tiny_adapter(tmp_path, hidden_size=64))
        assert torch.equal(draw(pipe), base) and pipe.get_list_adapters() == []


@CUDA
def test_graphs_follow_the_adapters_under_a_memory_plan(folder: Path) -> None:
    graphs, loops = (load_quietly(folder / "pipe", torch_dtype=torch.bfloat16) for _ in range(2))
    for pipe in (graphs, loops):
        pipe.set_memory_plan("full", "cuda")
        pipe.enable_fast_sampling(graph=pipe is graphs, compile=False)
    embeds, mask = loops.encode_captions(["a red apple"])
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 1.0}  # T5 stays away
    for name, change in {"base": lambda *_: None, **CHANGES}.items():
        change(graphs, folder / "lora")
        change(loops, folder / "lora")
        expected = draw(loops, **given)
        assert all(torch.equal(draw(graphs, **given), expected) for _ in range(3)), name
    assert graphs._fast is not None and graphs._fast.solver_graphs.num_recorded >= 1


@CUDA
def test_adapters_come_and_go_under_the_offloading_of_diffusers(folder: Path) -> None:
    offloaded, free = load_quietly(folder / "pipe"), load_quietly(folder / "pipe")
    offloaded.enable_model_cpu_offload()
    for name, change in CHANGES.items():
        change(offloaded, folder / "lora")
        change(free.to("cpu"), folder / "lora")
        assert torch.equal(draw(offloaded), draw(free.to("cuda"))), name
        assert offloaded.transformer.device.type == "cpu"


def test_layers_are_of_the_kind_they_were_when_adapters_go(pipe: PixArtPipeline, folder: Path) -> None:
    kinds = {name: type(module) for name, module in use_onednn(pipe.transformer).named_modules()}
    pipe.load_lora_weights(folder / "lora")
    pipe.unload_lora_weights()
    assert {name: type(module) for name, module in pipe.transformer.named_modules()} == kinds


def test_several_at_once(pipe: PixArtPipeline, folder: Path) -> None:
    pipe.load_lora_weights(folder / "lora")
    whole = draw(pipe)
    pipe.load_lora_weights(folder / "lora", "other", weight_name=COMFYUI_WEIGHTS)
    assert pipe.get_list_adapters() == ["default_0", "other"]
    pipe.set_adapters(["default_0", "other"], [0.5, 0.5])
    assert_same(draw(pipe), whole)
    pipe.fuse_lora(lora_scale=2.0)
    pipe.unload_lora_weights()
    doubled = draw(pipe)
    pipe.load_lora_weights(folder / "lora", "style")
    pipe.set_adapters("style", -1.0)
    assert_same(draw(pipe), whole)
    assert (doubled - whole).abs().max() > 0.01


def test_mistakes(pipe: PixArtPipeline, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"no adapter is loaded; load_lora_weights first"):
        pipe.fuse_lora()
    pipe.load_lora_weights(folder / "lora", "style")
    with pytest.raises(PromptError, match=r"adapter 'x' is not loaded; loaded are style"):
        pipe.set_adapters("x")
    with pytest.raises(PromptError, match=r"2 adapter_weights for 1 adapters"):
        pipe.set_adapters(["style"], [1.0, 2.0])
    with pytest.raises(CheckpointError, match=r"adapter 'style' is loaded already"):
        pipe.load_lora_weights(folder / "lora", "style")
    with pytest.raises(CheckpointError, match=r"cannot be saved with loaded adapters"):
        pipe.save_pretrained(tmp_path / "new")
    pipe.fuse_lora()
    with pytest.raises(PromptError, match=r"unfuse_lora\(\) before"):
        pipe.set_adapters("style", 0.5)
    pipe.unload_lora_weights()
    pipe.enable_fast_sampling(fp8=True)
    with pytest.raises(PromptError, match=r"load adapters before the network is put into FP8"):
        pipe.load_lora_weights(folder / "lora")


def test_an_adapter_without_effect_is_said(
    pipe: PixArtPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = pipe.transformer
    start_lora(network, 2)
    write_adapter(read_adapter_from(network), tmp_path)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    assert "changes nothing: its factors are zero" in caplog.text


def test_the_programs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    door = Door(monkeypatch, capsys)
    options = ["--pipeline_load_from", folder / "pipe", "--prompt", "a red apple", "--step", 2, "--device", "cpu"]
    command = ["scripts/inference.py", "--model_path", folder / "pipe", *options]
    lora = ["--lora", folder / "lora", "--lora_scale", 0.5]
    assert door(*command, *lora, "--output", tmp_path / "with").returncode == 0
    recipe = read_recipe(next((tmp_path / "with").glob("*.png")))
    assert recipe["loras"] == [{"lora": str(folder / "lora"), "scale": 0.5}]
    merged = tmp_path / "merged"
    done = door("tools/merge_lora.py", folder / "pipe", folder / "lora", "--lora_scale", 0.5, "--out", merged)
    assert done.returncode == 0, done.stderr
    command[2] = merged
    assert door(*command, "--output", tmp_path / "merged-pictures").returncode == 0
    other = read_recipe(next((tmp_path / "merged-pictures").glob("*.png")))
    assert other["model_fingerprint"] == recipe["model_fingerprint"]  # the very same weights
    done = door("tools/convert_lora.py", folder / "lora", tmp_path / "comfy", "--to", "comfyui")
    converted, written = load_file(tmp_path / "comfy" / COMFYUI_WEIGHTS), load_file(folder / "lora" / COMFYUI_WEIGHTS)
    assert converted.keys() == written.keys()
    assert all(torch.equal(converted[key], written[key]) for key in written)
    small = door(
        "tools/merge_lora.py", folder / "pipe", folder / "lora", "--out", tmp_path / "s", "--save_dtype", "fp16"
    )
    assert small.returncode == 0, small.stderr
    weights = load_file(tmp_path / "s/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    file = door("tools/convert_lora.py", folder / "lora", tmp_path / "a.safetensors", "--to", "comfyui")
    assert "must be a folder" in file.stderr and not (tmp_path / "a.safetensors").exists()
    assert "did you mean" in door("tools/convert_lora.py", folder / "lora", tmp_path, "--to", "comfy").stderr
    assert "--lora_scale is given without --lora" in door(*command, "--lora_scale", 1).stderr
