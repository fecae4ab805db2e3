"""What every result file carries beside its figures: command, machine and versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's name; Linux keeps it in /proc/cpuinfo only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def kernel_packages() -> dict[str, str]:
    """Versions of the packages with kernels that are installed; none of them need be."""
    versions = {}
    for name in ("flash-attn-3", "flash-attn-4", "quack-kernels"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_report(path: Path, figures: dict[str, Any]) -> None:
    """Print the figures and write them with their command, machine and versions as JSON.

    Args:
        figures: may name a `device` of their own; else it is the first GPU, or the CPU where there is none.
    """
    import torch

    from diffusion.inference.recipe import library_versions

    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": library_versions() | kernel_packages(),
    }
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    text = json.dumps({**device, **figures, **facts}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nwritten to {path}")
