"""Tensors that may be shards of FSDP2: this process's part, the whole, a part of a given whole; networks of them."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_SHELL = "_shell_before_sharding"


def local(tensor: Any) -> Any:
    """The part of a tensor that this process holds, sharing its memory; of anything else, itself."""
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


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The processes that share tensors of a network that is not in use; None = they are not sharded."""
    return next((tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)), None)


def live_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that a state dict names, without its copies and hooks, which cost too much for every step."""
    named = chain(network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    return dict(named)


@contextlib.contextmanager
def on_shards(optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """Within, an optimiser has this process's shards for parameters, gradients and moments: plain tensors.

    An update of each element by itself comes out the same, and the dispatch of DTensors, which takes the host longer
    than the launch of the kernels, is spared. Yields the parameters of all groups.
    """
    groups, moments = optimizer.param_groups, optimizer.state
    by_group = [group["params"] for group in groups]
    parameters = [*chain(*by_group)]
    if mesh_of(parameters) is None:
        yield parameters
        return
    with torch.no_grad():  # where no shard is a copy
        shards = {parameter: local(parameter) for parameter in parameters}
        held = {
            shards[parameter]: {name: local(value) for name, value in values.items()}
            for parameter, values in moments.items()
        }
        for parameter, shard in shards.items():
            shard.grad = None if parameter.grad is None else local(parameter.grad)
    for group in groups:
        group["params"] = [shards[parameter] for parameter in group["params"]]
    optimizer.state = defaultdict(dict, held)
    try:
        yield [*shards.values()]
    finally:
        for group, own in zip(groups, by_group):
            group["params"] = own
        with torch.no_grad():
            for parameter, shard in shards.items():
                shard.grad = None
                for name, value in optimizer.state.get(shard, {}).items():
                    before = moments[parameter].get(name)
                    if before is None or local(before) is not value:  # made in this step
                        moments[parameter][name] = _whole_moment(value, parameter)
        optimizer.state = moments


def _whole_moment(value: Any, parameter: Tensor) -> Any:
    """A moment made on a shard as part of a whole like the parameter; numbers (a step count) are what they are."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != local(parameter).shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)


def sum_over_shards(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Add up, in place, what each process has summed over its shards; collective."""
    dist.all_reduce(value, group=mesh.get_group("shard"))
    return value


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
