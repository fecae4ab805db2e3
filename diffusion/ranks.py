"""Ranks, devices and collectives: one place, so that every program runs on one process and on many alike.

`python`, `torchrun`, `accelerate launch` and `python -m torch.distributed.launch` only set environment variables
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); this module reads them.
"""

from __future__ import annotations

import os
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
        ConfigError: more local processes than GPUs.
    """

    def __init__(self, device: str = "auto", timeout_s: int = 1800) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        use_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        if use_cuda and local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; lower --nproc-per-node"
            )
        self.device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(self.device)
        self.owns_group = self.world_size > 1 and not dist.is_initialized()
        if self.owns_group:
            backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
            dist.init_process_group(
                backend, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=timeout_s)
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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
