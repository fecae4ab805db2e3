"""Adapters: nothing at first, the same network in peft's hands on diffusers' model, and files that come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import PeftModel
from safetensors import safe_open

from diffusion.adapters import (
    LORA_FOLDER,
    add_lora,
    load_lora_tensors,
    lora_state_dict,
    merge_lora,
    read_lora,
    save_lora,
    without_lora,
)
from diffusion.checkpoints import load_transformer, save_transformer
from diffusion.errors import CheckpointError
from diffusion.models import PixArt
from tests.checkpoints.tiny_files import same_tensors, small_model
from tests.models.test_pixart import inputs

INPUTS = {**inputs(), "caption_embeds": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))}
INPUTS["caption_mask"] = torch.ones(2, 5, dtype=torch.bool)


def adapted(rank: int = 2, *, alpha: float | None = 3.0) -> PixArt:
    network = add_lora(small_model(), rank, alpha)
    generator = torch.Generator().manual_seed(4)
    for tensor in lora_state_dict(network).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return network


@torch.no_grad()
def test_fresh_and_switched_off_adapters_are_the_base_exactly() -> None:
    expected = small_model()(**INPUTS)
    assert torch.equal(add_lora(small_model(), 2)(**INPUTS), expected)
    network = adapted()
    assert (network(**INPUTS) - expected).abs().max() > 1e-2
    with without_lora(network):
        assert torch.equal(network(**INPUTS), expected)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trainable == set(lora_state_dict(network))


@torch.no_grad()
def test_peft_on_diffusers_model_predicts_the_same(tmp_path: Path) -> None:
    network = adapted()
    save_transformer(small_model(), tmp_path / "base")
    save_lora(network, tmp_path / "lora", base="the base")
    stock = PixArtTransformer2DModel.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(stock, tmp_path / "lora").eval()
    arguments = {
        "hidden_states": INPUTS["latents"], "timestep": INPUTS["timesteps"],
        "encoder_hidden_states": INPUTS["caption_embeds"], "encoder_attention_mask": INPUTS["caption_mask"].long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False,
    }  # fmt: skip
    torch.testing.assert_close(opened(**arguments)[0], network(**INPUTS), atol=1e-4, rtol=1e-4)
    with safe_open(str(tmp_path / "lora" / LORA_FOLDER / "pytorch_lora_weights.safetensors"), "pt") as file:
        assert file.metadata()["rank"] == "2" and file.metadata()["alpha"] == "3"
        assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in file.keys()  # noqa: SIM118


@torch.no_grad()
def test_files_come_back_exactly_and_merging_changes_nothing(tmp_path: Path) -> None:
    network = adapted(rank=3)
    save_lora(network, tmp_path)
    fresh = add_lora(small_model(), 3, 3.0)
    load_lora_tensors(fresh, read_lora(tmp_path), tmp_path)
    assert same_tensors(lora_state_dict(fresh), lora_state_dict(network))
    merged = merge_lora(fresh)
    torch.testing.assert_close(merged(**INPUTS), network(**INPUTS), atol=1e-4, rtol=1e-4)
    save_transformer(merged, tmp_path / "merged")
    assert torch.equal(load_transformer(tmp_path / "merged")(**INPUTS), merged(**INPUTS))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_lora(adapted(rank=2), tmp_path)
    with pytest.raises(CheckpointError, match="use the lora_rank that it was trained with"):
        load_lora_tensors(add_lora(small_model(), 4), read_lora(tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapter_model"):
        read_lora(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="LoRA weights"):
        load_transformer(tmp_path / "adapter_model.safetensors")
