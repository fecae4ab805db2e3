"""Tiny networks of every published kind, and the files that other programs make of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoints import config_to_diffusers, native_to_diffusers, save_tensors
from diffusion.models import PixArt

SMALL = {"hidden_size": 48, "num_heads": 2, "depth": 2, "caption_channels": 16, "input_size": 8}
SIGMA_OPTIONS = {
    "micro_condition": False,
    "model_max_length": 300,
    "qk_norm": True,
    "kv_compress": {"sampling": "conv", "scale_factor": 2, "layers": (1,)},
}


def small_model(**options: object) -> PixArt:
    torch.manual_seed(0)
    model = PixArt(**{**SMALL, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def control_state(model: PixArt, blocks: int = 1) -> dict[str, Tensor]:
    """The keys of a ControlNet file: the base model, copied blocks and their linear layers (arXiv:2401.05252)."""
    state = {f"base_model.{key}": tensor for key, tensor in model.state_dict().items()}
    width = model.config.hidden_size
    for index in range(blocks):
        own = model.blocks[index].state_dict()
        state |= {f"controlnet.{index}.copied_block.{key}": tensor.clone() for key, tensor in own.items()}
        for name in ("before_proj", "after_proj") if index == 0 else ("after_proj",):
            state[f"controlnet.{index}.{name}.weight"] = torch.zeros(width, width, device=model.pos_embed.device)
            state[f"controlnet.{index}.{name}.bias"] = torch.zeros(width, device=model.pos_embed.device)
    return state


def write_old_diffusers(model: PixArt, folder: Path) -> Path:
    """A transformer folder as diffusers 0.22-0.25 wrote the published alpha models."""
    import json

    folder.mkdir(parents=True)
    config = {**config_to_diffusers(model.config), "_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0"}
    for later in ("interpolation_scale", "use_additional_conditions"):
        del config[later]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: tensor.contiguous() for key, tensor in native_to_diffusers(model.state_dict()).items()}
    tensors["caption_projection.y_embedding"] = model.y_embedder.y_embedding
    save_tensors(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
