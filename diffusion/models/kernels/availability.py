"""Where Triton kernels run, in which precision products do, and where compiled kernels are kept."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, slowly


def product_dtype(tokens: torch.Tensor) -> torch.dtype:
    """Precision of matrix products of these tokens: autocast's, where it is on."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def kept_in(name: str) -> Path:
    """Folder of this user for compiled kernels of one kind, which later processes find there."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pixart" / name


def can_run(device: torch.device) -> bool:
    """Whether Triton kernels run there."""
    return HAS_TRITON and (device.type == "cuda" or INTERPRETED)
