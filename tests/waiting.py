"""Waiting for what another process does, however busy the machine is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | subprocess.Popen[bytes], seconds: float = 300
) -> None:
    """Return as soon as the condition holds; fail when the process ends before, or when nothing happens for so long."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), f"the process ended with {process.returncode} before"
        assert time.monotonic() < limit, f"not within {seconds:.0f} s"
        time.sleep(0.002)
