"""Weights that live in host memory and visit the device: whole, or block by block.

diffusers' group offloading does something alike, but it locks every tensor apart and learns the order of the blocks
during the first pass; a pipeline run has only one pass through T5. Here one copy moves one block.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # bytes; kernels read 16 at a time


class HostWeights:
    """The parameters and buffers of a module in one block of host memory, and copies of that block on a device.

    The tensors of the module become views of whichever block `point_at` names; tied tensors stay tied. For CUDA the
    block is page-locked, so that copies run at the full speed of the bus beside computation.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, without: Sequence[nn.Module] = ()) -> None:
        """Move the module's tensors into the block, except those of the submodules in `without`."""
        left_out = {id(tensor) for part in without for tensor in _tensors(part)}
        self.device = device
        self._tensors = [tensor for tensor in _tensors(module) if id(tensor) not in left_out]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in self._tensors]
        self._offsets = [0, *itertools.accumulate(sizes)]
        self.num_bytes = self._offsets.pop()
        self.host = self._host_block()
        for tensor, view in zip(self._tensors, self._views(self.host)):
            view.copy_(tensor.data)
            tensor.data = view  # one at a time: the old tensors go as the block fills

    def copy(self, block: Tensor | None = None) -> Tensor:
        """Enqueue the copy to the device, into the start of `block` or a new one; returns the block."""
        if block is None:
            block = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
        block[: self.num_bytes].copy_(self.host, non_blocking=True)
        return block

    def point_at(self, block: Tensor) -> None:
        """Make the module's tensors views of a block that `copy` filled, or of `host`."""
        for tensor, view in zip(self._tensors, self._views(block)):
            tensor.data = view

    def _views(self, block: Tensor) -> list[Tensor]:
        return [
            block[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, offset in zip(self._tensors, self._offsets)
        ]

    def _host_block(self) -> Tensor:
        if self.device.type != "cuda" or self.num_bytes == 0:
            return torch.empty(self.num_bytes, dtype=torch.uint8)
        # Pages of its own, locked in place: torch's own pinned allocations round up to a power of two.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        block = torch.frombuffer(mmap.mmap(-1, self.num_bytes, **private), dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(block.data_ptr(), self.num_bytes, 0))
        if code != 0:
            _logger.warning("host memory cannot be page-locked (CUDA error %d); copies will be slower", code)
            with contextlib.suppress(RuntimeError):  # the next launch would report the same error again
                torch.zeros(1, device=self.device)
        else:
            weakref.finalize(self, runtime.cudaHostUnregister, block.data_ptr()).atexit = False
        return block


class WholeVisitor:
    """A module that visits the device as a whole."""

    def __init__(self, module: nn.Module, device: torch.device, blocks: Sequence[nn.Module] = ()) -> None:
        """`blocks`: parts of a large module, which move to the host's blocks of memory one after another."""
        self._module, self._device = module, device
        self._weights: list[HostWeights] = []
        if device.type == "cuda":  # elsewhere host and device share one memory, and leaving would free nothing
            self._weights = [HostWeights(block, device) for block in blocks]
            self._weights.append(HostWeights(module, device, without=blocks))

    def enter(self) -> None:
        """Bring the weights to the device."""
        for weights in self._weights:
            weights.point_at(weights.copy())
        if not self._weights:
            self._module.to(self._device)

    def leave(self) -> None:
        """Point the module back at host memory; the device memory is free again."""
        for weights in self._weights:
            weights.point_at(weights.host)


class StreamingVisitor:
    """A module whose blocks visit the device one after another, the next one travelling while one computes.

    Two blocks' worth of device memory hold them in turn; the rest of the module visits as a whole. The arithmetic is
    that of the whole module, so results are equal bit for bit. Blocks must run in the order given.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._blocks = [HostWeights(block, device) for block in blocks]
        self._rest = HostWeights(module, device, without=blocks)
        self._slots: list[Tensor] = []
        self._ready: list[torch.cuda.Event | None] = [None, None]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._position = 0  # blocks computed since `enter`, over any number of passes
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self._before(number))
            block.register_forward_hook(lambda *_, number=number: self._after(number))

    def enter(self) -> None:
        """Bring the rest, and start copying the first two blocks."""
        self._rest.point_at(self._rest.copy())
        size = max(block.num_bytes for block in self._blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._position = 0
        for position in range(2):
            self._send(position)

    def leave(self) -> None:
        """Point everything back at host memory."""
        if self._copies is not None:  # a copy that was begun for a further pass must not land in memory given back
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        self._slots = []
        for weights in (*self._blocks, self._rest):
            weights.point_at(weights.host)

    def _before(self, number: int) -> None:
        if not self._slots:
            return
        assert number == self._position % len(self._blocks), "blocks run in another order than they were given"
        slot = self._position % 2
        event = self._ready[slot]
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        self._blocks[number].point_at(self._slots[slot])

    def _after(self, number: int) -> None:
        if not self._slots:
            return
        self._blocks[number].point_at(self._blocks[number].host)
        self._send(self._position + 2)
        self._position += 1

    def _send(self, position: int) -> None:
        """Copy the block of a position into its slot, once all work enqueued so far has let go of it."""
        weights, slot = self._blocks[position % len(self._blocks)], position % 2
        if self._copies is None:
            weights.copy(self._slots[slot])
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            weights.copy(self._slots[slot])
            self._ready[slot] = self._copies.record_event()


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}.values())
