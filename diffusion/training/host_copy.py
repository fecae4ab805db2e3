"""A copy of a run's tensors in host memory, from which files are written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
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

    def take(self, tree: Any) -> Any:
        """The same nested dicts, lists and tuples with every tensor copied, valid until the next `take`."""
        copied = self._copy(tree, "")
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), name)
        if isinstance(value, Mapping):
            return {key: self._copy(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, f"{name}/{index}") for index, item in enumerate(value))
        return value

    def _copy_tensor(self, tensor: Tensor, name: str) -> Tensor | None:
        tensor = whole(tensor)
        if not self._keep:
            return None
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
