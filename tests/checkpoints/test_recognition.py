"""What a checkpoint is, from keys and shapes alone: full-size key sets on the meta device."""

from __future__ import annotations

import pytest
import torch

from diffusion.checkpoints.recognition import common_prefix, control_blocks, recognise
from diffusion.errors import CheckpointError
from diffusion.models import PixArt_XL_2, PixArtMS_XL_2
from tests.checkpoints.tiny_files import control_state, small_model

KV = {"sampling": "conv", "scale_factor": 2, "layers": tuple(range(14, 28))}
SIGMA = {"micro_condition": False, "model_max_length": 300}
# name, factory, options, family, pixels, keys of the file.
PUBLISHED = [
    ("alpha 256", PixArt_XL_2, {"input_size": 32}, "alpha", 256, 437),
    ("alpha 512", PixArt_XL_2, {"input_size": 64}, "alpha", 512, 437),
    ("alpha 1024", PixArtMS_XL_2, {"input_size": 128, "pe_interpolation": 2.0}, "alpha", 1024, 445),
    ("sigma 256", PixArt_XL_2, {"input_size": 32, "pe_interpolation": 0.5, **SIGMA}, "sigma", 256, 437),
    ("sigma 512", PixArtMS_XL_2, {"input_size": 64, **SIGMA}, "sigma", 512, 437),
    ("sigma 2K", PixArtMS_XL_2, {"input_size": 256, "pe_interpolation": 4.0, **SIGMA}, "sigma", 2048, 437),
    (
        "sigma 2K KV",
        PixArtMS_XL_2,
        {"input_size": 256, "pe_interpolation": 4.0, "qk_norm": True, "kv_compress": KV, **SIGMA},
        "sigma",
        2048,
        605,
    ),
]


@pytest.mark.parametrize(
    ("factory", "options", "family", "pixels", "keys"),
    [row[1:] for row in PUBLISHED],
    ids=[row[0] for row in PUBLISHED],
)
def test_published_kinds_are_told_from_keys_and_shapes(factory, options, family, pixels, keys) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        model = factory(**options)
    state = model.state_dict()
    assert len(state) == keys
    found, config, notes = recognise(state, "file.pth")
    assert (found, config, notes) == (family, model.config, [])
    assert config.input_size * 8 == pixels


@pytest.mark.parametrize(("factory", "keys"), [(PixArt_XL_2, 660), (PixArtMS_XL_2, 668)])
def test_control_networks(factory, keys: int) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        model = factory(input_size=64)
    state = control_state(model, blocks=13)
    assert len(state) == keys
    control = {key: tensor for key, tensor in state.items() if key.startswith("controlnet.")}
    assert sum(tensor.numel() for tensor in control.values()) == 294_917_760
    assert control_blocks(control, model.state_dict(), "file") == 13
    control["controlnet.3.after_proj.bias"] = torch.zeros(7)
    control["controlnet.2.surprise"] = control.pop("controlnet.12.copied_block.attn.qkv.bias")
    with pytest.raises(CheckpointError) as error:
        control_blocks(control, model.state_dict(), "file")
    expected = (
        "controlnet.12.copied_block.attn.qkv.bias (missing)",
        "controlnet.2.surprise (unexpected)",
        "controlnet.3.after_proj.bias (7,), not (1152,)",
    )
    assert all(part in str(error.value) for part in expected)


def test_the_scale_of_the_position_table_is_read_from_it() -> None:
    for scale in (0.5, 1.0, 2.0, 1.5):
        model = small_model(input_size=32, pe_interpolation=scale)
        _, config, notes = recognise(model.state_dict(), "x", num_heads=2)
        assert config.pe_interpolation == scale
        assert bool(notes) == (scale != 1.0)
    state = {**model.state_dict(), "pos_embed": torch.randn(1, 256, 48)}
    _, config, notes = recognise(state, "x", num_heads=2)
    assert config.pe_interpolation == 1.0
    assert "left out" in notes[0]
    half = {**state, "pos_embed": model.pos_embed.bfloat16()}
    assert recognise(half, "x", num_heads=2)[1].pe_interpolation == 1.5


def test_what_no_key_tells_is_asked_for() -> None:
    state = small_model().state_dict()
    with pytest.raises(CheckpointError, match="give num_heads"):
        recognise(state, "x")
    with pytest.raises(CheckpointError, match=r"for 64 px .* not for image_size=512; give 64"):
        recognise(state, "x", num_heads=2, image_size=512)
    bare = {key: tensor for key, tensor in state.items() if key not in ("pos_embed", "y_embedder.y_embedding")}
    with pytest.raises(CheckpointError, match="give image_size"):
        recognise(bare, "x", num_heads=2)
    family, config, notes = recognise(bare, "x", num_heads=2, image_size=64)
    assert (family, config.model_max_length, len(notes)) == ("alpha", 120, 1)
    assert recognise(bare, "x", num_heads=2, image_size=64, family="sigma")[1].model_max_length == 300
    for heads, pixels, message in ((0, 64, "num_heads=0"), (-1, 64, "num_heads=-1"), (2, -64, "no positive multiple")):
        with pytest.raises(CheckpointError, match=message):
            recognise(bare, "x", num_heads=heads, image_size=pixels)
    with pytest.raises(CheckpointError, match="choose one of alpha, sigma"):
        recognise(bare, "x", num_heads=2, image_size=64, family="beta")
    with pytest.raises(CheckpointError, match="only Sigma has"):
        recognise(small_model(qk_norm=True).state_dict(), "x", num_heads=2, family="alpha")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["base.to_q.lora_A.weight"], "LoRA"),
        (["norm", "block1.convs.0.weight"], "HED"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
        (["decoder.conv_in.weight"], "VAE"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "U-Net"),
        (["first", "second"], "missing: x_embedder.proj.weight.*found: first, second"),
    ],
)
def test_other_models_are_named(keys: list[str], kind: str) -> None:
    with pytest.raises(CheckpointError, match=kind):
        recognise({key: torch.zeros(1) for key in keys}, "x")


def test_prefixes_of_wrappers() -> None:
    key = "x_embedder.proj.weight"
    for prefix in ("", "module.", "model.diffusion_model.", "module._orig_mod."):
        assert common_prefix([f"{prefix}{key}", f"{prefix}t_block.1.bias"]) == prefix
    assert common_prefix(["transformer.pos_embed.proj.weight"]) == "transformer."
    assert common_prefix(["transformer_blocks.0.attn1.to_q.bias", "pos_embed.proj.weight"]) == ""
    assert common_prefix([f"base_model.{key}"]) == ""
