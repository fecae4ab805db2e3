"""A copy of a run's tensors in host memory, from which files are written while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.training.sharding import whole


class HostCopies:
    """Copies of nested state into buffers that are reused from save to save, page-locked for tensors of a GPU.

    The seam between a way of sharding and the files of a checkpoint: a DTensor is gathered, tensor by tensor, so that
    a checkpoint does not depend on the layout that wrote it. When there are any, all ranks copy the same things in the
    same order; ranks that do not write keep nothing.

    Args:
        keep: this rank writes the files.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, tree: Any) -> None:
        """Allocate what `take` of such a tree fills: of fresh memory, that costs many times what filling does.

        May run in a thread of its own; `take` must wait for it.
        """
        if self._keep:
            # Memory comes page by page, when it is first written to.
            _walk(tree, "", lambda tensor, name: self._buffer(tensor, name).zero_())

    def take(self, tree: Any) -> Any:
        """The same nested dicts, lists and tuples with every tensor copied, valid until the next `take`."""
        copied = _walk(tree, "", self._copy)
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, tensor: Tensor, name: str) -> Tensor | None:
        tensor = whole(tensor.detach())
        return self._buffer(tensor, name).copy_(tensor, non_blocking=tensor.is_cuda) if self._keep else None

    def _buffer(self, tensor: Tensor, name: str) -> Tensor:
        """The host memory of a tensor, which may be a DTensor: its shape is that of the whole."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


def _walk(value: Any, name: str, change: Callable[[Tensor, str], Any]) -> Any:
    """Nested dicts, lists and tuples with every tensor changed; its name is the path that leads to it."""
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, Mapping):
        return {key: _walk(item, f"{name}/{key}", change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_walk(item, f"{name}/{index}", change) for index, item in enumerate(value))
    return value
