"""Gradients averaged by copies between the GPUs of a host, where DDP would use NCCL.

A collective of NCCL computes on multiprocessors that the backward pass then lacks, and a matrix product that is cut for
all of them needs a second round for those missing. Here each process owns a share of every bucket: it pulls the others'
parts of its share, adds them, and the others pull the sum. Copy engines move the data; only the additions compute.
Between hosts, processes with the same share sum it by NCCL.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from diffusion.ranks import Ranks
from diffusion.training.run_log import LOGGER

BUCKET_MB = 100  # a block of XL/2 has 85; larger ones wait longer, smaller ones do not fill a fast link
BUCKET_VALUES = BUCKET_MB << 18  # of float32


@dataclass(frozen=True)
class PeerMemory:
    """Memory of the same length in every process of a host, which all of them can read.

    rank: of this process on its host. parts: of each process there, float32 (N); parts[rank] is this one's to write.
    barrier: on the current stream, all processes of the host have come here with what they wrote.
    stream: on which the memory is read and written once it is filled; None = the current one.
    between: the processes with this rank on their hosts; None for one host.
    """

    rank: int
    parts: list[Tensor]
    barrier: Callable[[], object]
    stream: torch.cuda.Stream | None = None
    between: dist.ProcessGroup | None = None


@dataclass(eq=False)
class Bucket:
    """Gradients that are averaged together.

    parts: of each process, the bucket's range of its memory; views: this process's, in the shapes of the parameters.
    missing: gradients that the backward pass still owes.
    """

    parameters: list[nn.Parameter]
    parts: list[Tensor]
    views: list[Tensor]
    missing: int = 0

    def gather(self) -> None:
        """Move gradients to where peers read them; those that were accumulated lie there already."""
        gradients = [parameter.grad for parameter in self.parameters]
        fresh = [(gradient, view) for gradient, view in zip(gradients, self.views) if gradient is not view]
        if fresh:
            torch._foreach_copy_([view for _, view in fresh], [gradient for gradient, _ in fresh])  # type: ignore[misc]
        for parameter, view in zip(self.parameters, self.views):
            parameter.grad = view


class CopiedSums(nn.Module):
    """A network after whose backward pass every process has the mean of all processes' gradients, as with DDP.

    The first backward pass shows in which order gradients come. From the second on, those complete are averaged while
    the pass goes on.

    Args:
        network: on its device; all processes get the main one's weights.
        memory: at least as long as all parameters that train.
    """

    def __init__(self, network: nn.Module, memory: PeerMemory) -> None:
        super().__init__()
        self.module = network
        self._memory, self._stream, self._own = memory, memory.stream, memory.parts[memory.rank]
        self._trained = [(name, each) for name, each in network.named_parameters() if each.requires_grad]
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}  # by number of the parameter
        self._arrived: list[int] = []
        self._averaged, self._averages, self._in_backward = 0, True, False
        own = weakref.ref(self)  # Python does not see a cycle through a hook, and would never free the network
        for number, (_, parameter) in enumerate(self._trained):
            parameter.register_post_accumulate_grad_hook(functools.partial(_announce, own, number))
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.data, src=0)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add to the gradients of this process alone."""
        self._averages = False
        try:
            yield
        finally:
            self._averages = True

    def _on_gradient(self, number: int) -> None:
        if not self._in_backward:
            self._in_backward, self._averaged, self._arrived = True, 0, []
            for bucket in self._buckets:
                bucket.missing = len(bucket.parameters)
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
        self._arrived.append(number)
        if not self._buckets:
            return
        bucket = self._bucket_of[number]
        bucket.missing -= 1
        if bucket.missing == 0:
            bucket.gather()
            self._average_complete()

    def _average_complete(self) -> None:
        """In the order of the buckets, which is the same on all processes."""
        for bucket in self._buckets[self._averaged :] if self._averages else []:
            if bucket.missing:
                return
            with self._on_stream():
                average_in_shares(bucket.parts, self._incoming, self._memory)
            self._averaged += 1

    def _finish(self) -> None:
        """The backward pass has ended."""
        self._in_backward = False
        if len(self._arrived) < len(self._trained):
            missing = sorted(name for number, (name, _) in enumerate(self._trained) if number not in self._arrived)
            raise RuntimeError(
                f"{len(missing)} parameters had no gradient in a backward pass: {', '.join(missing[:5])}"
            )
        if not self._buckets:
            self._fill_buckets()
        if self._averages:
            self._average_complete()
            with self._on_stream():
                self._memory.barrier()  # nobody reads any longer what the next backward pass overwrites
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)

    def _fill_buckets(self) -> None:
        """Buckets in the order in which the main process's gradients came, filled with the gradients that are there."""
        order = [self._arrived]
        dist.broadcast_object_list(order, src=0)
        ends = itertools.accumulate(self._trained[number][1].numel() for number in order[0])
        end_of = dict(zip(order[0], ends))
        begin = 0
        for _, group in itertools.groupby(order[0], lambda number: end_of[number] // BUCKET_VALUES):
            numbers = list(group)
            parameters, end = [self._trained[number][1] for number in numbers], end_of[numbers[-1]]
            pieces = self._own[begin:end].split([parameter.numel() for parameter in parameters])
            views = [piece.as_strided(each.size(), each.stride()) for piece, each in zip(pieces, parameters)]
            bucket = Bucket(parameters, [part[begin:end] for part in self._memory.parts], views)
            bucket.gather()
            self._buckets.append(bucket)
            self._bucket_of.update(dict.fromkeys(numbers, bucket))
            begin = end
        longest = max(bucket.parts[0].numel() for bucket in self._buckets)
        self._incoming = self._own.new_empty(longest // len(self._memory.parts) + 1)

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """What is queued inside comes after what the current stream holds so far."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)


def _announce(model: weakref.ref[CopiedSums], number: int, _: Tensor) -> None:
    if (alive := model()) is not None:
        alive._on_gradient(number)


def average_in_shares(parts: list[Tensor], incoming: Tensor, memory: PeerMemory) -> None:
    """The mean over processes, in the memories of all, in the same bits.

    Args:
        parts: a range of the memory of each process of the host, float32 (N).
        incoming: room for a share, at least N / processes, rounded up.
    """
    rank = memory.rank
    shares = [torch.tensor_split(part, len(parts)) for part in parts]  # by owner of the memory, then of the share
    own, others = shares[rank][rank], [(rank + step) % len(parts) for step in range(1, len(parts))]
    incoming = incoming[: own.numel()]
    memory.barrier()
    for peer in others:  # no two processes read from the same one at once
        incoming.copy_(shares[peer][rank])
        own.add_(incoming)
    hosts = 1
    if memory.between is not None:
        hosts = memory.between.size()
        dist.all_reduce(own, group=memory.between)
    own.div_(len(parts) * hosts)
    memory.barrier()
    for peer in others:
        shares[rank][peer].copy_(shares[peer][peer])


def peer_memory(network: nn.Module, ranks: Ranks) -> PeerMemory | None:
    """Memory for the gradients of a network if on every host several GPUs read each other's.

    None otherwise, on all processes: no GPUs, one a host, no link between them, parameters in other precisions.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if ranks.any(not _reach_each_other(ranks) or {each.dtype for each in trained} != {torch.float32}):
        return None
    memory, problem = None, "another process could not"
    try:
        memory = _open_memory(sum(parameter.numel() for parameter in trained), ranks)
    except (RuntimeError, ImportError, AttributeError) as error:  # a part of torch that is still moving
        problem = str(error)
    if ranks.any(memory is None):
        LOGGER.info("gradients are summed by NCCL: no memory that all GPUs of a host read (%s)", problem)
        return None
    return memory


def _reach_each_other(ranks: Ranks) -> bool:
    """Whether this GPU reads the memory of the host's others, and processes are numbered host by host."""
    local, device = ranks.local_world_size, ranks.device
    if device.type != "cuda" or local == 1 or ranks.world_size % local or ranks.rank % local != device.index:
        return False
    return all(torch.cuda.can_device_access_peer(device, index) for index in range(local) if index != device.index)


def _open_memory(length: int, ranks: Ranks) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric_memory

    local, within, between = ranks.local_world_size, dist.group.WORLD, None
    if local < ranks.world_size:
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size // local, local))
        between, within = mesh.get_group(0), mesh.get_group(1)
    own = symmetric_memory.empty(length, dtype=torch.float32, device=ranks.device)
    handle = symmetric_memory.rendezvous(own, within)  # type: ignore[arg-type]  # it is open
    parts = [handle.get_buffer(rank, (length,), torch.float32) for rank in range(local)]
    stream = torch.cuda.Stream(ranks.device, priority=-1)
    return PeerMemory(ranks.rank % local, parts, handle.barrier, stream, between)
