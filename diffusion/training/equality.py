"""Tensors that all processes should hold alike: compared by checksums, and the first that differs is named."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from diffusion.errors import NumericalError
from diffusion.ranks import Ranks
from diffusion.training.sharding import local
from diffusion.training.state import RunState

# Name of a tensor, which part of it (None = all), checksum.
Entry = tuple[str, "tuple[int, ...] | None", int]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_equal(state: RunState, ranks: Ranks) -> None:
    """Compare weights, buffers, EMA and optimiser over the processes that hold the same part of them.

    A checksum is the sum of a tensor's bit patterns as integers: any single changed number changes it. It reads every
    tensor once and exchanges 8 bytes for each. Parts that one process alone holds (full_shard) have no twin to compare.

    Raises:
        NumericalError: on every process: the first tensor that differs, and where.
    """
    if ranks.world_size == 1:
        return
    state.settle()
    tensors = list(_tensors(state))
    sums = torch.stack([checksum(local(tensor.detach())) for _, tensor in tensors]).tolist()
    mine: list[Entry] = [("step", None, state.step), ("skipped_steps", None, state.skipped_steps)]
    mine += [(name, _shard_of(tensor), value) for (name, tensor), value in zip(tensors, sums)]
    difference = first_difference(ranks.gather(mine))
    if difference is not None:
        name, rank, twin = difference
        raise NumericalError(
            f"{name} of rank {rank} is not that of rank {twin} after step {state.step}, though both hold one part; "
            "suspect the memory or link of a device: resume from a save before this step, without it if it recurs"
        )


def checksum(tensor: Tensor) -> Tensor:
    """() int64: sum of the bit patterns of a tensor's numbers."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def first_difference(all_sums: list[list[Entry]]) -> tuple[str, int, int] | None:
    """Name, rank and the rank that it should agree with, of the first tensor that differs; lists are in rank order."""
    for entries in zip(*all_sums):
        seen: dict[object, list[int]] = {}
        for rank, (_, key, _value) in enumerate(entries):
            seen.setdefault(key, []).append(rank)
        for twins in seen.values():
            odd = [rank for rank in twins if entries[rank][2] != entries[twins[0]][2]]
            if len(odd) > len(twins) // 2 and len(twins) > 2:
                return entries[0][0], twins[0], odd[0]  # most agree with each other and not with the first
            if odd:
                return entries[0][0], odd[0], twins[0]
    return None


def _tensors(state: RunState) -> Iterator[tuple[str, Tensor]]:
    names = {id(parameter): name for name, parameter in state.network.named_parameters()}
    yield from state.network.state_dict().items()
    if state.average is not None:
        yield from ((f"EMA of {name}", tensor) for name, tensor in state.average.tensors.items())
    for parameter, moments in state.optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.device == local(parameter).device:
                yield f"{key} of {names[id(parameter)]}", value


def _shard_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Which part of a whole this process holds; None = all of it."""
    if not isinstance(tensor, DTensor):
        return None
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "every process belongs to the mesh"
    return tuple(place for place, how in zip(coordinate, tensor.placements) if isinstance(how, Shard))
