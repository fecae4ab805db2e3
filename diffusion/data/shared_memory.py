"""Shared memory in which a worker of the loader hands over a batch."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

from torch import Tensor

_LEAST = 2**20  # bytes; smaller tensors are freed in no time
_REMOVE: int | None = getattr(mmap, "MADV_REMOVE", None)  # Linux has it


def discard(tensor: Tensor) -> None:
    """Give the pages of a large tensor in shared memory back to the system; its numbers are lost.

    Freeing the tensor does so as well, but while it holds Python's lock: for the captions of 128 pictures that takes
    longer than some blocks, and no other thread launches kernels meanwhile. A call through ctypes does not hold it.
    Elsewhere than on Linux, and for tensors of any other kind, nothing happens.
    """
    if _REMOVE is None or tensor.device.type != "cpu" or tensor.nbytes < _LEAST:
        return
    if not (tensor.is_shared() and tensor.is_contiguous()):
        return
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page
    _libc().madvise(first, end - first, _REMOVE)  # where it is refused, the tensor is freed as it was


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
