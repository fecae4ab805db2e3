"""Processes find each other, also where an earlier start has left its keys in the launcher's store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from diffusion.errors import ConfigError
from diffusion.ranks import Ranks, agreed_round

ROOT = Path(__file__).parents[1]
TIMEOUT = timedelta(seconds=20)
DIES_THREE_TIMES = f"""
import os, signal, time, torch, torch.distributed as dist
from diffusion.ranks import Ranks
ranks, start = Ranks("cpu"), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
assert ranks.total(torch.ones(1)).item() == 2
if start < 3:
    ranks.barrier()
    if ranks.rank == start % 2:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    time.sleep(60)
dist.barrier(group=dist.new_group([0, 1]))
open(f"{{os.environ['OUT']}}/{{ranks.rank}}", "w").close()
ranks.close()
"""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be an integer, 1 or more"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1' must be an integer, 0 or more"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
    ],
)
def test_variables_that_cannot_be_right(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Ranks("cpu")


def agree(store: dist.Store, world_size: int) -> list[str]:
    """What the processes of one start (threads here, each with its own connection) call their round."""
    names = [""] * world_size

    def join(rank: int) -> None:
        connection = dist.TCPStore("localhost", store.port, is_master=False, timeout=TIMEOUT)  # type: ignore[attr-defined]
        names[rank] = agreed_round(connection, rank, world_size, TIMEOUT)

    # Rank 0 comes last: the others find what earlier starts have left, and must not believe it.
    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_has_a_name_of_its_own_in_a_store_that_outlives_it() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=TIMEOUT)
    rounds = [agree(store, 3) for _ in range(4)]
    assert all(len(set(names)) == 1 and names[0] for names in rounds)
    assert len({names[0] for names in rounds}) == 4


def test_a_start_without_rank_0_ends_in_time() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=2))
    store.set("round", "of a start that is gone")
    with pytest.raises(dist.DistStoreError, match="rank 0 did not answer rank 1"):
        agreed_round(store, 1, 2, timedelta(seconds=0.3))


@pytest.mark.slow
def test_processes_that_die_are_started_again_three_times(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(DIES_THREE_TIMES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
