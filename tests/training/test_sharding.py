"""Tensors that are shards: what an optimiser does to them as plain tensors is what it does to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffusion.training.optimization import WeightAverage, global_norm
from diffusion.training.sharding import live_tensors, on_shards, whole

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """One gloo process; several are in test_parallel.py."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(*, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    if sharded:
        fully_shard(network, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
    return network


def train(network: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage, steps: int) -> list[float]:
    norms = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        network(inputs).square().mean().backward()
        norm = global_norm(network.parameters())
        norms.append(norm.item())
        with on_shards(optimizer) as shards:
            assert not any(isinstance(shard, DTensor) for shard in shards)
            nn.utils.clip_grads_with_norm_(shards, 0.5, norm)
            optimizer.step()
        average.update(network)
    return norms


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("group")
def test_steps_on_shards_are_those_of_whole_tensors(name: str) -> None:
    found = []
    for sharded in (False, True):
        network = make(sharded=sharded)
        optimizer = OPTIMIZERS[name](list(network.parameters()))
        average = WeightAverage(network, 0.9)
        norms = train(network, optimizer, average, 3)
        assert all(isinstance(key, DTensor) is sharded for key in optimizer.state)
        assert all(parameter.grad is not None for parameter in network.parameters())
        moments = [value for held in optimizer.state.values() for value in held.values()]
        if sharded:
            parameters = list(network.parameters())
            assert [id(key) for group in optimizer.param_groups for key in group["params"]] == [*map(id, parameters)]
            large = [value for value in moments if value.ndim]
            assert large and all(isinstance(value, DTensor) for value in large)
        found.append((norms, [whole(t) for t in [*network.parameters(), *moments, *average.tensors.values()]]))
    (norms, tensors), (other_norms, others) = found
    assert norms == pytest.approx(other_norms, rel=1e-6)
    assert len(tensors) == len(others) and all(torch.equal(a, b) for a, b in zip(tensors, others))


@pytest.mark.usefixtures("group")
def test_an_error_within_leaves_the_optimizer_as_it_was() -> None:
    network = make(sharded=True)
    optimizer = OPTIMIZERS["AdamW"](list(network.parameters()))
    train(network, optimizer, WeightAverage(network, 0.9), 1)
    state, before = optimizer.state, {id(key): dict(held) for key, held in optimizer.state.items()}
    with pytest.raises(RuntimeError, match="in the middle"), on_shards(optimizer):
        raise RuntimeError("in the middle")
    assert optimizer.state is state
    assert all(held[name] is value for key, held in state.items() for name, value in before[id(key)].items())
    assert all(isinstance(key, DTensor) for group in optimizer.param_groups for key in group["params"])


def test_live_tensors_are_the_tensors_of_a_state_dict() -> None:
    network = make(sharded=False)
    network.register_module("tied", network[0])
    live, state = live_tensors(network), network.state_dict()
    assert live.keys() == state.keys()
    assert all(live[key].data_ptr() == state[key].data_ptr() for key in state)
