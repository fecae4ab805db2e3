"""Gradients averaged by copies: the arithmetic, with threads as processes (runs of processes: test_parallel.py)."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from diffusion.ranks import Ranks
from diffusion.training.copied_sums import CopiedSums, PeerMemory, average_in_shares, peer_memory


@pytest.mark.parametrize(("world", "length"), [(2, 10), (3, 1001), (8, 5)])
def test_shares_become_the_mean_everywhere_in_the_same_bits(world: int, length: int) -> None:
    parts, barrier = [torch.randn(length) for _ in range(world)], threading.Barrier(world)
    mean = torch.stack(parts).double().mean(0)
    incoming = [torch.empty(-(-length // world)) for _ in range(world)]
    threads = [
        threading.Thread(target=average_in_shares, args=(parts, incoming[rank], PeerMemory(rank, parts, barrier.wait)))
        for rank in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in parts:
        assert torch.equal(part, parts[0])
        assert torch.allclose(part.double(), mean, atol=1e-6)


@pytest.fixture
def group(tmp_path):  # type: ignore[no-untyped-def]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_parameter_without_gradient_is_named() -> None:
    network = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    model = CopiedSums(network, PeerMemory(0, [torch.zeros(12)], lambda: None))
    with pytest.raises(RuntimeError, match=r"2 parameters had no gradient in a backward pass: idle.bias, idle.weight"):
        model.module["used"](torch.randn(3, 2)).sum().backward()


@pytest.mark.usefixtures("group")
def test_gradients_accumulate_where_they_are_averaged() -> None:
    network, inputs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), torch.randn(2, 5, 3)
    memory = torch.zeros(sum(each.numel() for each in network.parameters()))
    model = CopiedSums(network, PeerMemory(0, [memory], lambda: None))
    for _ in range(2):  # the order of gradients is unknown, then known
        network.zero_grad(set_to_none=True)
        with model.no_sync():
            model(inputs[0]).sum().backward()
        model(inputs[1]).sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        expected = torch.autograd.grad(network(inputs).sum(), list(network.parameters()))
        for gradient, value in zip(gradients, expected):
            assert gradient is not None
            torch.testing.assert_close(gradient, value)
            assert gradient.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


@pytest.mark.usefixtures("group")
def test_a_network_is_freed_with_what_sums_its_gradients() -> None:
    network = nn.Linear(2, 2)
    model = CopiedSums(network, PeerMemory(0, [torch.zeros(6)], lambda: None))
    for _ in range(2):
        model(torch.randn(3, 2)).sum().backward()
    weights = weakref.ref(network.weight)
    del network, model
    gc.collect()
    assert weights() is None


def test_processes_without_gpus_sum_otherwise() -> None:
    assert peer_memory(nn.Linear(2, 2), Ranks("cpu")) is None
