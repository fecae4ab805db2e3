"""PixArt from DiT (PixArt-alpha, arXiv:2310.00426, Sec. 2.3): adaLN becomes adaLN-single without changing the output.

A DiT block owns a layer that makes its six modulations from time and class. PixArt has one such layer for all blocks,
and a table of offsets a block. The tables are chosen so that at one timestep (500 in the paper) every block gets the
modulation that it had; the caption comes in through layers that start at zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion.models.dit import DiT, modulations
from diffusion.models.initialization import zero_
from diffusion.models.pixart import PixArt

_SAME = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "pred_sigma", "prediction_type")
PAPER_TIMESTEP = 500.0


@torch.no_grad()
def start_from_dit(model: PixArt, dit: DiT, *, timestep: float = PAPER_TIMESTEP, class_id: int | None = None) -> PixArt:
    """Give a fresh PixArt the weights of a DiT; at `timestep` it then predicts what the DiT predicts for a class.

    The shared layer becomes the mean of the blocks' layers, which is nearest to all of them, so that the modulations
    move with time about as they did. The caption's own layers stay as they were drawn.

    Args:
        model: as its constructor made it; changed in place. Its size in pixels may be another than the DiT's.
        timestep: where the two agree, in [0, 1000).
        class_id: None = the DiT's null class.
    Returns:
        `model`.
    Raises:
        ValueError: another shape of network, an option that DiT has not, a class or timestep that does not exist.
    """
    _require_same_shape(model, dit)
    class_id = dit.null_class if class_id is None else class_id
    if not 0 <= class_id <= dit.null_class:
        raise ValueError(f"class_id={class_id} must be between 0 and {dit.null_class}, which is no class")
    if not 0 <= timestep < 1000:
        raise ValueError(f"timestep={timestep} must be in [0, 1000)")
    _copy(dit.x_embedder, model.x_embedder)
    _copy(dit.t_embedder, model.t_embedder)
    dit_blocks: list[Any] = list(dit.blocks)
    blocks: list[Any] = list(model.blocks)
    for name in ("weight", "bias"):
        each = torch.stack([getattr(block.adaLN_modulation[1], name) for block in dit_blocks])
        getattr(model.t_block[1], name).copy_(each.mean(0))
    time: Tensor = model.t_embedder(torch.full((1,), float(timestep)))  # (1, D)
    shared = model.t_block(time)[0].unflatten(0, (6, -1))  # (6, D)
    per_block, last = modulations(dit, timestep, class_id)
    for block, source, wanted in zip(blocks, dit_blocks, per_block):
        _copy(source.attn, block.attn)
        _copy(source.mlp, block.mlp)
        block.scale_shift_table.copy_(wanted - shared)
        zero_(block.cross_attn.proj)
    _copy(dit.final_layer.linear, model.final_layer.linear)
    model.final_layer.scale_shift_table.copy_(last - time)
    if model.config.micro_condition:
        silence_sizes(model)
    return model


@torch.no_grad()
def silence_sizes(model: PixArt) -> None:
    """Size and ratio conditions add nothing until they are trained."""
    for embedder in (model.csize_embedder, model.ar_embedder):
        zero_(embedder.mlp[2])  # type: ignore[arg-type]


def _require_same_shape(model: PixArt, dit: DiT) -> None:
    config = model.config
    different = [
        f"{name}={getattr(config, name)} (DiT {getattr(dit.config, name)})"
        for name in _SAME
        if getattr(config, name) != getattr(dit.config, name)
    ]
    if different:
        raise ValueError(f"the network has {', '.join(different)}; make them equal")
    extra = [name for name in ("qk_norm", "kv_compress") if getattr(config, name)]
    if extra:
        raise ValueError(f"the network has {' and '.join(extra)}, which no DiT has; turn it off")


def _copy(source: torch.nn.Module, target: torch.nn.Module) -> None:
    target.load_state_dict(source.state_dict())
