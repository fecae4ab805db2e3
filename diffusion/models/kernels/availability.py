"""Where Triton kernels run."""

from __future__ import annotations

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, slowly


def can_run(device: torch.device) -> bool:
    """Whether Triton kernels run there."""
    return HAS_TRITON and (device.type == "cuda" or INTERPRETED)
