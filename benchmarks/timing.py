"""Time on a device: work that is finished, and the rate of a matrix product to measure it by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def matmul_rate(device: Any, size: int, dtype: Any = None) -> float:
    """FLOP/s of a square matrix product, the best of five; dtype None = the encoders' precision."""
    dtype = dtype or compute_dtype(device)
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    best, repeats = float("inf"), 20 if device.type == "cuda" else 2
    for _ in range(5):
        finish(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        finish(device)
        best = min(best, (time.perf_counter() - started) / repeats)
    return 2 * size**3 / best


def compute_dtype(device: Any) -> Any:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def finish(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: Any, work: Callable[[], object]) -> float:
    """Seconds of a call, the device's work included."""
    finish(device)
    started = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - started
