"""Every kind of file and folder opens with one function, as the network that was saved; bad ones are explained."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from diffusion.checkpoints import (
    diffusers_to_native,
    load_controlnet,
    load_transformer,
    native_to_diffusers,
    open_checkpoint,
    read_native,
    save_tensors,
    save_transformer,
)
from diffusion.checkpoints.training_state import save_checkpoint
from diffusion.errors import CheckpointError
from diffusion.models import PixArt
from tests.checkpoints.tiny_files import (
    SIGMA_OPTIONS,
    control_state,
    same_tensors,
    small_model,
    write_old_diffusers,
)


def training_file(model: PixArt) -> dict:
    """What the original's trainer saves: parameters wrapped, a buffer that requires gradients, an optimiser, an EMA."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model.x_embedder.proj.bias.sum().backward()
    optimizer.step()
    state = OrderedDict((key, torch.nn.Parameter(tensor)) for key, tensor in model.state_dict().items())
    averaged = {key: tensor * 0.5 for key, tensor in model.state_dict().items()}
    return {
        "state_dict": state,
        "state_dict_ema": averaged,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
    }


@pytest.mark.parametrize("kind", ["bare", "training", "old torch", "ddp", "safetensors", "single pipeline"])
@pytest.mark.parametrize("options", [{}, {"micro_condition": True}, SIGMA_OPTIONS], ids=["alpha", "MS", "sigma"])
def test_native_files(tmp_path: Path, kind: str, options: dict) -> None:
    model = small_model(**options)
    path = tmp_path / "model.pth"
    content = training_file(model) if kind == "training" else model.state_dict()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_tensors(state, path)
    elif kind == "single pipeline":
        prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}
        torch.save({"state_dict": {**prefixed, "vae.something": torch.zeros(1)}}, path)
    elif kind == "ddp":
        torch.save({f"module.{key}": tensor for key, tensor in state.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old torch")
    opened = open_checkpoint(path, num_heads=2)
    assert opened.found.config == model.config
    assert opened.found.family == ("sigma" if options.get("qk_norm") else "alpha")
    assert opened.found.layout == "native"
    assert opened.found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert same_tensors(opened.build().state_dict(), state)
    if kind == "training":
        averaged = load_transformer(path, ema=True, num_heads=2).state_dict()
        assert torch.equal(averaged["t_block.1.weight"], state["t_block.1.weight"] * 0.5)


def test_a_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(small_model().state_dict(), path)
    state = read_native(path)
    before = state["t_block.1.weight"].clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(state["t_block.1.weight"], before)


def test_averaged_weights_that_a_file_lacks(tmp_path: Path) -> None:
    torch.save(small_model().state_dict(), tmp_path / "bare.pth")
    save_tensors(small_model().state_dict(), tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="no state_dict_ema: it is a bare state dict"):
        open_checkpoint(tmp_path / "bare.pth", ema=True)
    with pytest.raises(CheckpointError, match="one set of weights"):
        open_checkpoint(tmp_path / "one.safetensors", ema=True)


@pytest.mark.parametrize("kind", ["stock", "sharded", "variant", "sharded variant", "torch files"])
def test_folders_that_stock_diffusers_writes(tmp_path: Path, kind: str) -> None:
    model = small_model(micro_condition=True, pe_interpolation=2.0)
    save_transformer(model, tmp_path / "ours")
    stock = PixArtTransformer2DModel.from_pretrained(str(tmp_path / "ours"))
    variant = "fp16" if "variant" in kind else None
    size = "100KB" if "sharded" in kind else "10GB"
    folder = tmp_path / "pipe" / "transformer"
    stock.save_pretrained(folder, variant=variant, max_shard_size=size, safe_serialization=kind != "torch files")
    assert (len(list(folder.iterdir())) > 3) == ("sharded" in kind)
    opened = open_checkpoint(tmp_path / "pipe", variant=variant)
    assert opened.found.config == model.config
    assert opened.found.layout == "diffusers"
    given = model.state_dict()
    built = opened.build().state_dict()
    assert all(torch.equal(built[key], given[key]) for key in given if key != "y_embedder.y_embedding")
    if variant:
        with pytest.raises(CheckpointError, match="no variant, only variant 'fp16'"):
            open_checkpoint(tmp_path / "pipe")


def test_folders_of_the_first_diffusers_versions_keep_their_null_caption(tmp_path: Path) -> None:
    model = small_model(input_size=128, micro_condition=True, pe_interpolation=2.0)
    folder = write_old_diffusers(model, tmp_path / "transformer")
    opened = open_checkpoint(folder)
    assert opened.found.config == model.config
    assert same_tensors(opened.build().state_dict(), model.state_dict())
    single = tmp_path / "single.safetensors"
    (folder / "diffusion_pytorch_model.safetensors").rename(single)
    alone = open_checkpoint(single, num_heads=2)
    assert (alone.found.layout, alone.found.image_size) == ("diffusers", 1024)
    assert same_tensors(alone.build().state_dict(), model.state_dict())


@pytest.mark.parametrize(("described", "tokens"), [("PixArtSigmaPipeline", 300), ("PixArtAlphaPipeline", 120)])
def test_sigma_folders_read_300_tokens(tmp_path: Path, described: str, tokens: int) -> None:
    model = small_model(input_size=64)
    save_transformer(model, tmp_path / "transformer")
    weights = dict(native_to_diffusers(model.state_dict()))
    save_tensors(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")  # as others write it
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": described}))
    assert open_checkpoint(tmp_path).found.config.model_max_length == tokens


def test_an_lcm_is_told_by_its_scheduler_or_name(tmp_path: Path) -> None:
    save_transformer(small_model(), tmp_path / "one" / "transformer")
    assert not open_checkpoint(tmp_path / "one").found.lcm
    (tmp_path / "one" / "scheduler").mkdir()
    (tmp_path / "one/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "LCMScheduler"}))
    assert open_checkpoint(tmp_path / "one").found.lcm
    save_transformer(small_model(), tmp_path / "PixArt-LCM-XL-2-1024-MS")
    found = open_checkpoint(tmp_path / "PixArt-LCM-XL-2-1024-MS").found
    assert found.lcm
    assert "LCM" in found.describe()


def test_checkpoints_of_a_run(tmp_path: Path) -> None:
    model = small_model(model_max_length=77)
    folder = save_checkpoint(tmp_path, 5, 10, lambda aside: save_transformer(model, aside / "transformer"))
    assert open_checkpoint(folder).found.config == model.config
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="checkpoint-5 is damaged: transformer/diff.* bytes instead of"):
        open_checkpoint(folder)


def test_control_networks_are_recognised_and_not_taken_for_a_transformer(tmp_path: Path) -> None:
    model = small_model(micro_condition=True, depth=3)
    state = control_state(model, blocks=2)
    torch.save({"state_dict": state}, tmp_path / "control.pth")
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    opened = open_checkpoint(tmp_path / "control.pth", num_heads=2)
    assert opened.found.control_blocks == 2
    assert opened.found.num_keys == len(state)
    assert same_tensors(opened.control, {key: state[key] for key in state if key.startswith("controlnet.")})
    assert same_tensors(opened.state_dict, model.state_dict())
    with pytest.raises(CheckpointError, match="without control blocks"):
        open_checkpoint(tmp_path / "plain.pth", num_heads=2).build_control()
    network = load_controlnet(tmp_path / "control.pth", num_heads=2)
    assert same_tensors(network.state_dict(), state)
    with pytest.raises(CheckpointError, match="is a ControlNet with 2 blocks"):
        load_transformer(tmp_path / "control.pth", num_heads=2)


def test_keys_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    state = small_model().state_dict()
    state["surprise"] = torch.zeros(1)
    del state["blocks.1.mlp.fc2.bias"], state["final_layer.linear.weight"], state["t_embedder.mlp.0.weight"]
    state["t_block.1.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "odd.pth", num_heads=2)
    text = str(error.value)
    assert "\n" not in text
    missing = ("blocks.1.mlp.fc2.bias", "final_layer.linear.weight", "t_embedder.mlp.0.weight")
    assert all(part in text for part in ("missing: ", *missing, "unexpected: surprise", "(5,)", "odd.pth"))


def test_relative_positions_that_were_never_read_are_left_out(tmp_path: Path) -> None:
    model = small_model()
    state = {**model.state_dict(), "blocks.0.attn.rel_pos_h": torch.zeros(7, 24)}
    torch.save(state, tmp_path / "rel.pth")
    opened = open_checkpoint(tmp_path / "rel.pth", num_heads=2)
    assert opened.found.notes == (
        "1 keys were left out: relative positions, which the original allocates and never reads",
    )
    assert same_tensors(opened.build().state_dict(), model.state_dict())


def test_damage_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    stock = tmp_path / "stock"
    save_transformer(small_model(), folder)
    PixArtTransformer2DModel.from_pretrained(str(folder)).save_pretrained(stock, max_shard_size="100KB")
    next(stock.glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-\d+.safetensors cannot be read"):
        open_checkpoint(stock)
    (stock / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(stock)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes()[:4000])
    with pytest.raises(CheckpointError, match="cut.safetensors cannot be read"):
        open_checkpoint(cut)
    torch.save(small_model().state_dict(), tmp_path / "whole.pth")
    for kept in (0, 4000):
        (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:kept])
        with pytest.raises(CheckpointError, match=r"cut\.pth is cut or damaged .*copy or download it again"):
            open_checkpoint(tmp_path / "cut.pth")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        open_checkpoint(folder)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CheckpointError, match="describes UNet2DConditionModel"):
        open_checkpoint(folder)
    (tmp_path / "loose").mkdir()
    torch.save({}, tmp_path / "loose" / "a.pth")
    with pytest.raises(CheckpointError, match=r"give one of its files instead: a.pth"):
        open_checkpoint(tmp_path / "loose")


def test_a_folder_states_its_size(tmp_path: Path) -> None:
    save_transformer(small_model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"for 64 px .* not for image_size=1024; give 64"):
        open_checkpoint(tmp_path, image_size=1024)


def test_the_null_caption_of_old_folders_is_no_unknown_key() -> None:
    state = native_to_diffusers(small_model().state_dict())
    null = torch.ones(120, 16)
    assert torch.equal(
        diffusers_to_native({**state, "caption_projection.y_embedding": null})["y_embedder.y_embedding"], null
    )
