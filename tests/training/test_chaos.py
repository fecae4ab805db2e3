"""benchmarks/chaos_training.py with few faults: two real processes, killed at random moments, in a save, by SIGTERM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.programs import run_program


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_killed_again_and_again_ends_bit_equal(tmp_path: Path) -> None:
    faults = ["--kills", "4", "--kills-in-save", "2", "--terminations", "2", "--seed", "1"]
    done = run_program(["benchmarks/chaos_training.py", *faults, "--out", str(tmp_path / "chaos.json")])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "chaos.json").read_text())
    assert (result["kill_9"], result["kill_9_in_a_save"], result["sigterm"]) == (6, 2, 2)
    assert result["corrupt_checkpoints"] == 0
    assert result["runs_bit_equal_to_the_undisturbed_one"] == result["runs_compared"] > 0
