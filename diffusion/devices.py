"""One meaning of --device and --dtype for all programs, the rate of a device, and the way to it and back."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import ConfigError, first_line


def choose_device(name: str) -> torch.device:
    """A usable device by name; "auto" is cuda where there is one, else Apple's GPU (mps), else cpu.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name} cannot be used ({first_line(error).split('. ')[0]}); try --device cpu"
        ) from error


DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_dtype(name: str, device: torch.device, *, few_steps: bool = False) -> torch.dtype:
    """The precision of T5 and transformer by name (of `DTYPES`); "auto" is the best that the device is fast in.

    bfloat16 on CUDA cards that have it, float16 on older ones (T4, V100), else float32.

    Args:
        few_steps: an LCM draws, whose first step divides the network's error by sqrt(alpha_bar_999) = 0.0064: "auto" is
            then float16 on every card, which rounds 8 times finer than bfloat16. (The original drew so in float32.)
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 and not few_steps else torch.float16


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX-512 BF16 or AMX): twice the rate of float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOP/s of products of square matrices of `size` rows, the best of five trials."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best, repeats = math.inf, 20 if device.type == "cuda" else 2
    for trial in range(6):  # the first warms up
        started = time.perf_counter()
        for _ in range(repeats):
            product = a @ b
        product[0, 0].item()  # waits for the device
        if trial:
            best = min(best, (time.perf_counter() - started) / repeats)
    return 2 * size**3 / best


def sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or nested lists of them, as a tensor on a device. A CUDA card is not waited for."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way to host memory. A CUDA card goes on with what is enqueued after them meanwhile."""

    def __init__(self, *tensors: Tensor) -> None:
        """Enqueue the copies. All tensors lie on one device."""
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._copies = [tensor.cpu() for tensor in tensors]
            return
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into page-locked memory
        self._event = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait(self) -> list[Tensor]:
        """The copies, when they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
