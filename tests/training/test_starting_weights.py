"""A run starts from a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import native_to_diffusers, save_tensors, save_transformer
from diffusion.config import load_config
from diffusion.errors import CheckpointError
from diffusion.training.building import build_network
from tests.checkpoints.tiny_files import control_state, write_old_diffusers


@pytest.fixture
def config(config_file: Path):  # type: ignore[no-untyped-def]
    return load_config(config_file)


def test_kinds_of_starting_weights(config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    fresh = build_network(config)
    state = fresh.state_dict()
    torch.save({"state_dict": state, "optimizer": {}}, tmp_path / "a.pth")
    save_tensors({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}, tmp_path / "b.safetensors")
    diffusers = {key: tensor.contiguous() for key, tensor in native_to_diffusers(state).items()}
    save_tensors(diffusers, tmp_path / "c.safetensors")
    write_old_diffusers(fresh, tmp_path / "d")
    save_transformer(fresh, tmp_path / "e" / "transformer", stored_null_caption=True)
    for name in ("a.pth", "b.safetensors", "c.safetensors", "d", "e"):
        started = build_network(config, tmp_path / name)
        assert started.config == fresh.config
        found = started.state_dict()
        different = {key for key in state if not torch.equal(found[key], state[key])}
        # A single file in diffusers' names has no null caption; it is drawn anew.
        assert different == ({"y_embedder.y_embedding"} if name.startswith("c") else set()), name


def test_a_control_network_is_no_start(config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save(control_state(build_network(config)), tmp_path / "control.pth")
    with pytest.raises(CheckpointError, match="is a ControlNet; training starts from a transformer"):
        build_network(config, tmp_path / "control.pth")
