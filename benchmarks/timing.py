"""Time on a device: work that is finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


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
