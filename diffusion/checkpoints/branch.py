"""The trained branch of a ControlNet: written alone, opened beside its base, and joined with it as published files are.

`controlnet/config.json` and one safetensors file with the names of published files (`controlnet.0.after_proj.weight`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoints.files import WEIGHTS_NAME
from diffusion.checkpoints.folders import new_file
from diffusion.checkpoints.tensors import TensorFile
from diffusion.checkpoints.training_state import MANIFEST, verify
from diffusion.checkpoints.weights import CONFIG_IN_METADATA, require_fit, require_marked, save_tensors
from diffusion.errors import CheckpointError
from diffusion.models import ControlPixArt, PixArt, PixArtConfig

BRANCH_FOLDER = "controlnet"
_PREFIX = "controlnet."


def save_branch(model: ControlPixArt, folder: str | Path) -> None:
    """`write_branch` of a model."""
    write_branch({f"{_PREFIX}{key}": t for key, t in model.controlnet.state_dict().items()}, model.config, folder)


def write_branch(control: Mapping[str, Tensor], base: PixArtConfig, folder: str | Path) -> None:
    """Write control blocks (`controlnet.0.after_proj.weight`) and their base's config.

    Raises:
        StorageError: the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in control.items()}
    count = len({key.split(".")[1] for key in tensors})
    config = {"_class_name": "ControlPixArt", "control_blocks": count, "base": asdict(base)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(tensors, folder / WEIGHTS_NAME, {CONFIG_IN_METADATA: json.dumps(asdict(base))})


def find_branch(source: str | Path, *, ema: bool = False) -> Path | None:
    """The weight file of a branch: in a `checkpoint-N`, in its folder, or itself; None = it is something else.

    Args:
        ema: prefer the averaged weights, where there are some.
    Raises:
        CheckpointError: a `checkpoint-N` with missing or cut files.
    """
    path = Path(source)
    if (path / MANIFEST).is_file() and (problem := verify(path, hashes=False)) is not None:
        raise CheckpointError(f"{path} is damaged: {problem}; use another checkpoint")
    names = [f"{BRANCH_FOLDER}_ema", BRANCH_FOLDER] if ema else [BRANCH_FOLDER]
    for file in [*(path / name / WEIGHTS_NAME for name in names), path / WEIGHTS_NAME, path]:
        if file.is_file() and file.suffix == ".safetensors":
            return file if all(key.startswith(_PREFIX) for key in TensorFile(file)) else None
    return None


def read_branch(path: Path) -> tuple[PixArtConfig, dict[str, Tensor]]:
    """Config of the base, and the control blocks under the names of the file.

    Raises:
        CheckpointError: damaged, or without the config that `save_branch` writes into the header.
    """
    tensors = TensorFile(path)
    text = tensors.metadata.get(CONFIG_IN_METADATA)
    if text is None:
        raise CheckpointError(f"{path} does not say what base it belongs to; give the file that training wrote")
    return PixArtConfig(**json.loads(text)), dict(tensors)


def build_control(base: PixArt, control: Mapping[str, Tensor], source: str | Path) -> ControlPixArt:
    """A network in eval mode, frozen, around a base, whose device and dtype it takes.

    Raises:
        CheckpointError: the blocks do not fit.
    """
    count = len({key.split(".")[1] for key in control})
    try:
        model = ControlPixArt(base, count)
    except ValueError as error:
        raise CheckpointError(f"{source} is no ControlNet of its base: {error}") from error
    load_branch(model, control, source)
    return model.to(device=base.device, dtype=base.dtype).eval().requires_grad_(False)


def load_branch(model: ControlPixArt, control: Mapping[str, Tensor], source: str | Path) -> None:
    """Give the control blocks their weights, strictly. Raises CheckpointError when they do not fit."""
    blocks = {key.removeprefix(_PREFIX): tensor for key, tensor in control.items()}
    require_fit(model.controlnet, blocks, source)
    model.controlnet.load_state_dict(blocks)


def write_control_file(model: ControlPixArt, path: str | Path) -> Path:
    """Base and branch in one file with the names of the published ones: `.pth` (`state_dict` inside) or safetensors.

    Raises:
        CheckpointError: another suffix, the file exists, or see `require_marked`. StorageError: the disk is full.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise CheckpointError(f"{path} must end with .pth or .safetensors")
    require_marked(path, model.config)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with new_file(path) as aside:
        if path.suffix == ".pth":
            torch.save({"state_dict": tensors}, aside)
        else:
            save_tensors(tensors, aside, {CONFIG_IN_METADATA: json.dumps(asdict(model.config))})
    return path
