"""Benchmarks that need a card are tried at tiny size, so that the hour on the card is not spent on mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_memory_plans(tmp_path: Path) -> None:
    out = tmp_path / "plans.json"
    command = [sys.executable, "benchmarks/bench_memory_plans.py", "--tiny", "--device", "cpu", "--out", str(out)]
    options = ["--rows", "full", "4gb", "--steps", "2", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert set(result["rows"]) == {"full", "full x4", "4gb"}
    assert result["bars"]["latents of full and 4gb are bit-equal"] is True
    assert all(row["completes"] and row["finite"] for row in result["rows"].values())
