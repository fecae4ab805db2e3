"""Where tensors live: one meaning of --device for all programs that run on one device."""

from __future__ import annotations

import torch

from diffusion.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """A usable device by name; "auto" is cuda where there is one, else cpu.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error
