"""Ranks, devices and collectives: one place, so that every program runs on one process and on many alike.

`python`, `torchrun`, `accelerate launch` and `python -m torch.distributed.launch` only set environment variables
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); this module reads them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion.errors import ConfigError, PixArtError

T = TypeVar("T")


class Ranks:
    """This process among its peers.

    Args:
        device: "auto" takes the GPU of the local rank if there is one.
        timeout_s: after which a collective that a peer never joined fails.
    Raises:
        ConfigError: more local processes than GPUs, or a launcher's variable that cannot be right.
    """

    def __init__(self, device: str = "auto", timeout_s: int = 1800) -> None:
        self.world_size = _number("WORLD_SIZE", 1, least=1)
        self.rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
        if self.rank >= self.world_size:
            raise ConfigError(
                f"RANK={self.rank} must be below WORLD_SIZE={self.world_size}; see the launcher's command"
            )
        use_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        if use_cuda and not torch.cuda.is_available():
            raise ConfigError(f"device={device!r}: torch sees no CUDA GPU here; give cpu, or auto")
        if use_cuda and local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; lower --nproc-per-node"
            )
        self.device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(self.device)
        self.owns_group = self.world_size > 1 and not dist.is_initialized()
        if self.owns_group:
            self._open_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timedelta(seconds=timeout_s))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_world_size(self) -> int:
        """Processes on this host; all, where the launcher does not say."""
        return _number("LOCAL_WORLD_SIZE", self.world_size, least=1)

    def mean(self, values: Tensor) -> Tensor:
        """Average of a tensor over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM) / self.world_size

    def total(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """True on every rank if it is True on one."""
        return bool(self._reduce(torch.tensor(float(flag), device=self.device), dist.ReduceOp.MAX).item())

    def broadcast(self, value: Any) -> Any:
        """The main rank's (picklable) value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """What a function returns on the main rank, on every rank; errors that the user can mend are raised on all."""
        result: Any = None
        if self.is_main:
            try:
                result = function()
            except (PixArtError, OSError) as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, (PixArtError, OSError)):
            try:
                raise result
            finally:
                del result  # no cycle through its traceback, which would hold what failed (a lock, say) for a while
        return result  # type: ignore[no-any-return]

    def gather(self, value: Any) -> list[Any]:
        """The (picklable) values of all ranks in their order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _open_group(self, backend: str, timeout: timedelta) -> None:
        store, rank, world_size = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=timeout))
        store = dist.PrefixStore(agreed_round(store, rank, world_size, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)

    def close(self) -> None:
        """Leave the process group, if this object opened it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _reduce(self, values: Tensor, op: Any) -> Tensor:
        if self.world_size == 1:
            return values.clone()
        reduced = values.clone()
        dist.all_reduce(reduced, op=op)
        return reduced


def _number(variable: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{variable}={text!r} must be an integer, {least} or more; see the launcher's command")
    return int(text)


def agreed_round(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that these processes have in common and no earlier ones had: the prefix of their keys in a store.

    torchrun keeps one store over all its restarts, and with it the addresses of the processes that died: who finds
    those connects to nobody. TORCHELASTIC_RESTART_COUNT is no name, since each machine counts its own failures. So rank
    0 makes one up, and another believes it once rank 0 has returned what this process alone can have written.

    Raises:
        dist.DistStoreError: a process did not come in time.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("round", name)
        for peer in range(1, world_size):
            store.set(f"{name}/welcome/{peer}", store.get(f"{name}/hello/{peer}").decode())
        return name
    hello, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("round").decode()
        store.set(f"{name}/hello/{rank}", hello)
        welcome = f"{name}/welcome/{rank}"
        if store.check([welcome]) and store.get(welcome).decode() == hello:
            return name
        time.sleep(0.1)
    raise dist.DistStoreError(f"rank 0 did not answer rank {rank} within {timeout.total_seconds():.0f} s")
