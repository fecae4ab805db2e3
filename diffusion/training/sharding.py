"""Tensors that may be shards of FSDP2: this process's part, the whole, and a part of a given whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(template: Tensor, full: Tensor) -> Tensor:
    """A whole tensor in the layout of another: this process's shard of it, without communication."""
    if not isinstance(template, DTensor) or isinstance(full, DTensor):  # whole on both sides, or a part already
        return full
    on_device = full.to(template.device, template.dtype)
    return distribute_tensor(on_device, template.device_mesh, template.placements, src_data_rank=None)


def parts_like(templates: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`part_like` key by key; keys without a template stay as they are, for whoever checks names to refuse."""
    return {key: part_like(templates[key], tensor) if key in templates else tensor for key, tensor in full.items()}


def is_sharded(network: nn.Module) -> bool:
    """Whether a network's weights are shared out over processes."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory, gathered one at a time; every process must call it.

    Args:
        keep: whether this process wants them; the others get an empty dict.
    """
    gathered = {}
    for key, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[key] = full.cpu()
    return gathered
