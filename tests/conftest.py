"""What all tests share: models this small gain nothing from threads, and several workers would fight for the cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the programs that tests start inherit it


@pytest.fixture(autouse=True)
def _no_log_of_a_run_that_failed() -> Iterator[None]:
    """What another test says must not go to the folder of a run that this one broke off."""
    yield
    run_log = sys.modules.get("diffusion.training.run_log")
    if run_log is not None:
        run_log.close_log()
