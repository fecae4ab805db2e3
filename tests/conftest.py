"""What all tests share: models this small gain nothing from threads, and several workers would fight for the cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the programs that tests start inherit it
