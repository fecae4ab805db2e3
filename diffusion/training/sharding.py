"""Tensors that may be shards of FSDP2: this process's part, the whole, a part of a given whole; networks of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_SHELL = "_shell_before_sharding"


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
    """Whether a network's weights are shared out over processes, also while some of them are gathered."""
    return isinstance(network, FSDPModule)


def mesh_of(network: nn.Module) -> DeviceMesh | None:
    """The processes that share a network that is not in use; None = it is not sharded."""
    return next((weight.device_mesh for weight in network.parameters() if isinstance(weight, DTensor)), None)


def shell_of(network: nn.Module) -> Any:
    """A copy of a network on the meta device; of a sharded one, as it was before (see `keep_shell`)."""
    if is_sharded(network):
        return copy.deepcopy(network.__dict__[_SHELL])
    known: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
    for weight in network.parameters():
        known[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(network, known)  # which takes these for copies that it has made


def keep_shell(network: nn.Module) -> None:
    """Before sharding, after which torch refuses to copy a network: keep its shell beside it, not as a part of it."""
    network.__dict__[_SHELL] = shell_of(network)


def whole_copy(network: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of a network that is not sharded, on its device; collective if the network is sharded.

    Args:
        tensors: to take instead of the network's own, by the names of its state dict.
    """
    state = {**network.state_dict(), **tensors}
    made = shell_of(network)
    made.load_state_dict({key: whole(tensor.detach()).clone() for key, tensor in state.items()}, assign=True)
    return made


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
