"""Where tensors live and how precise they are: one meaning of --device and --dtype for all programs."""

from __future__ import annotations

import torch

from diffusion.errors import ConfigError


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
        raise ConfigError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error


DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of T5 and transformer by name (of `DTYPES`); "auto" is the best that the device is fast in.

    bfloat16 on CUDA cards that have it, float16 on older ones (T4, V100), else float32.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
