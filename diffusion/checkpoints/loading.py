"""Networks in eval mode from checkpoints of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoints.branch import build_control, find_branch, read_branch
from diffusion.checkpoints.dit import recognise_dit
from diffusion.checkpoints.opening import Weights, open_checkpoint, read_weights, require_kind
from diffusion.checkpoints.weights import load_weights, materialize_buffers
from diffusion.errors import CheckpointError
from diffusion.models import ControlPixArt, DiT, PixArt


def load_transformer(
    path: str | Path,
    *,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> PixArt:
    """A network in eval mode from a checkpoint of any kind; the weights exist once in memory.

    Args:
        path: see `open_checkpoint`, which takes the options too.
        dtype: None = as stored.
    Raises:
        CheckpointError: see `open_checkpoint`; or a ControlNet file, which is more than a transformer.
    """
    checkpoint = open_checkpoint(path, ema=ema, **options)
    if checkpoint.control:
        raise CheckpointError(
            f"{path} is a ControlNet with {checkpoint.found.control_blocks} blocks; open it with load_controlnet, "
            "or give a transformer here"
        )
    return checkpoint.build(device, dtype)


def load_controlnet(
    path: str | Path,
    base: PixArt | None = None,
    *,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> ControlPixArt:
    """A ControlNet with its base model, in eval mode: a published file, or a `checkpoint-N` of its training.

    Args:
        path: what training writes (`controlnet/`) is the branch alone, which needs a base. ema: its averaged weights.
        base: steer this network, which is frozen, in place of the base in the file; its device and dtype then count.
    Raises:
        CheckpointError: see `open_checkpoint`; the file is a plain transformer; or `base` is of another kind.
    """
    branch = find_branch(path, ema=ema)
    if branch is not None:
        config, control = read_branch(branch)
        if base is None:
            raise CheckpointError(
                f"{path} is the branch of a ControlNet alone; give the base that it was trained on too"
            )
        require_kind(config, base.config, path)
        return build_control(base, control, path)
    if base is None:
        return open_checkpoint(path, **options).build_control(device, dtype)
    checkpoint = open_checkpoint(path, **{"num_heads": base.config.num_heads, **options})
    return checkpoint.build_control(base.device, base.dtype, base=base)


def load_dit(source: str | Path, *, ema: bool = False, num_heads: int | None = None) -> DiT:
    """A DiT in eval mode, float32 on the CPU: from a public `.pt` file, or a folder of a run.

    Args:
        num_heads: what a file of another width than DiT-XL/2 does not tell.
    Raises:
        CheckpointError: nothing there, damaged, or no DiT.
    """
    return build_dit(read_weights(source, ema=ema), num_heads=num_heads)


def build_dit(weights: Weights, *, num_heads: int | None = None) -> DiT:
    """`load_dit` of weights that were read already."""
    if weights.layout != "dit":
        raise CheckpointError(f"{weights.source} is no class-conditional DiT (no y_embedder.embedding_table)")
    config = weights.dit or recognise_dit(weights.state_dict, weights.source, num_heads=num_heads)
    with torch.device("meta"):
        model = DiT(**vars(config))
    load_weights(model, weights.state_dict, weights.source, assign=True)
    materialize_buffers(model)
    return model.float().eval()
