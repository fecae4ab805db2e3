"""A process that dies or hangs: named, with stacks, exit code 78, nothing left behind; a restart goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion.config import load_config
from diffusion.ranks import Ranks
from diffusion.training.watchdog import Heartbeat, Watchdog, _Seen, is_communication_error
from tests.training.parallel_worker import SMALL
from tests.training.test_trainer import train_program
from tests.training.tiny_run import ROOT, curve, run

OPTIONS = [
    *SMALL,
    "train_batch_size=2",
    "max_steps=8",
    "save_model_steps=2",
    "validation.num_samples=0",
    "num_workers=1",
]
OPTIONS += ["health.hang_timeout_s=4.0"]
pytestmark = pytest.mark.alone  # a rank without a core looks as if it hung


def watchdog_that_sees(*seen: tuple[int, str, float, float, str | None]) -> Watchdog:
    """(count, phase, seconds since it ticked, seconds since it moved, end) of each rank; this process is rank 0."""
    watchdog = Watchdog(Ranks(), 5.0, Path("stacks"))
    watchdog._ranks.world_size = len(seen)
    now = time.monotonic()
    for rank, (count, phase, ticked, moved, end) in enumerate(seen):
        beat = Heartbeat(rank, "host", 100 + rank, 0, count, 5, phase, is_step=phase != "save", end=end)
        watchdog._peers[rank] = _Seen(beat, now - ticked, now - moved)
    return watchdog


def test_the_rank_that_is_behind_is_to_blame_not_those_that_wait() -> None:
    hang = watchdog_that_sees((22, "backward", 0, 9, None), (21, "forward", 0, 9, None))._find_hang()
    assert hang is not None
    assert "rank 1 on host" in hang and "rank 0" not in hang and "forward of step 5" in hang
    together = watchdog_that_sees((22, "backward", 0, 9, None), (22, "backward", 0, 9, None))._find_hang()
    assert together is not None and "suspect network" in together
    for fine in (
        ((22, "backward", 0, 9, None), (21, "forward", 0, 3, None)),  # within the time
        ((22, "backward", 0, 9, None), (21, "save", 0, 9, None)),  # saves and validation may take long
        ((22, "backward", 0, 9, None), (21, "forward", 0, 9, "done")),
    ):
        assert watchdog_that_sees(*fine)._find_hang() is None


def test_death_and_failure_are_told_apart() -> None:
    dead = watchdog_that_sees((9, "backward", 0, 1, None), (9, "forward", 6, 6, None))._find_dead(patience=5)
    assert dead is not None and "rank 1 on host (pid 101; last seen: forward of step 5) died" in dead
    failing = watchdog_that_sees((9, "backward", 0, 1, None), (9, "forward", 1, 1, "ValueError: x"))
    assert failing._find_dead(patience=5) is None
    failed = failing._find_dead(patience=0)
    assert failed is not None and "failed: ValueError: x" in failed
    echo = watchdog_that_sees((9, "data", 0, 1, None), (9, "data", 9, 9, "RuntimeError: [../gloo/pair.cc] reset"))
    assert echo._find_dead(patience=0) is None
    assert is_communication_error(RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer"))
    assert not is_communication_error(RuntimeError("shape mismatch"))


def launch(
    config_file: Path, work_dir: Path, fault: str, *flags: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    # A rendezvous of its own for every start: with a fixed port a restart may meet the addresses of those that died.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    program = train_program(config_file, work_dir, *OPTIONS, "resume_from.checkpoint=latest")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault}
    return subprocess.run(
        [sys.executable, *launcher, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


def assert_nothing_is_left(work_dir: Path) -> None:
    """No process of the run lives on (its work-dir is in its command line)."""
    mine = str(work_dir).encode()
    for _ in range(100):
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mine in _content(path)]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"{left} still run")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_hung_rank_is_named_with_its_stack(config_file: Path, tmp_path: Path) -> None:
    done = launch(config_file, tmp_path / "run", "hang@step=5,rank=1")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-6000:]
    assert re.search(r"rank 1 on \S+ \(pid \d+; last seen: forward of step 5\): no progress for [45] s", lines[0])
    assert done.stderr.count("exitcode  : 78") == 2
    assert "before_forward" in (tmp_path / "run/stacks/rank-1.txt").read_text()
    assert (tmp_path / "run/stacks/rank-0.txt").is_file()
    assert_nothing_is_left(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_rank_is_named(config_file: Path, tmp_path: Path) -> None:
    done = launch(config_file, tmp_path / "run", "kill@step=5,rank=1")
    assert done.returncode != 0
    assert re.search(r"error: rank 1 on \S+ \(pid \d+; last seen: \w+ of step \d\) died", done.stderr)
    assert "exitcode  : 78" in done.stderr
    assert_nothing_is_left(tmp_path / "run")


@pytest.mark.slow
def test_a_restart_goes_on(config_file: Path, tmp_path: Path) -> None:
    done = launch(config_file, tmp_path / "restarted", "kill@step=5,rank=1", "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from" in done.stdout and "checkpoint-4 at step 4" in done.stdout
    assert_nothing_is_left(tmp_path / "restarted")
    run(load_config(config_file, [*OPTIONS, "train_batch_size=4"]), tmp_path / "whole")
    assert curve(tmp_path / "restarted") == pytest.approx(curve(tmp_path / "whole"), rel=1e-5)
