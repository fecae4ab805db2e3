"""Signals, SAVE_NOW and the lock, on real processes; agreement of several ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffusion.checkpoints.training_state import list_checkpoints
from diffusion.config import load_config
from diffusion.errors import WorkDirLockedError
from diffusion.files import FolderLock
from diffusion.ranks import Ranks
from diffusion.training.requests import Request, Requests, resume_command
from tests.programs import run_program
from tests.training.test_trainer import train_program
from tests.training.tiny_run import ROOT, curve, run
from tests.waiting import wait_until


class Program:
    """A training program in a process group of its own, its output in a file."""

    def __init__(self, command: list[str], folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.output = folder / "output.txt"
        with self.output.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def until(self, condition: Callable[[], bool]) -> None:
        try:
            wait_until(condition, self.process)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.text()[-3000:]}") from None

    def text(self) -> str:
        return self.output.read_text()

    def send(self, number: int) -> None:
        """To the whole group, as a terminal or a scheduler does."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        return self.process.wait(300)


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[Program]:
    program = Program(command, folder)
    try:
        yield program
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.wait()


def steps(work_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(work_dir / "checkpoints")]


def trained(work_dir: Path) -> bool:
    return (work_dir / "metrics.jsonl").exists() and len(curve(work_dir)) > 0


def test_save_now_sigusr1_and_sigterm(config_file: Path, tmp_path: Path) -> None:
    """Each saves at the next step; training goes on after the first two. Loading workers feed it to the end."""
    work_dir = tmp_path / "run"
    command = train_program(config_file, work_dir, "max_steps=10000", "save_model_steps=None", "num_workers=1")
    with started(command, tmp_path) as program:
        program.until(lambda: trained(work_dir))
        (work_dir / "SAVE_NOW").touch()
        program.until(lambda: len(steps(work_dir)) == 1)
        assert not (work_dir / "SAVE_NOW").exists()
        program.send(signal.SIGUSR1)
        program.until(lambda: len(steps(work_dir)) == 2)
        with pytest.raises(WorkDirLockedError, match=rf'"pid": {program.process.pid}, "host": ".+", "since": "20'):
            FolderLock(work_dir)
        program.send(signal.SIGTERM)
        assert program.wait() == 75, program.text()[-3000:]
    last = steps(work_dir)[-1]
    final = program.text().splitlines()[-1]
    assert final == (
        f"error: SIGTERM: saved after step {last} of 800; go on with: python {' '.join(command)} --resume-from latest"
    )
    assert "Traceback" not in program.text()
    assert list(curve(work_dir)) == [*range(1, last + 1)]


@pytest.mark.slow
def test_ctrl_c_saves_and_tells_how_to_go_on(config_file: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "run"
    options = ["save_model_steps=None", "log_interval=4", "max_steps=30"]
    with started(train_program(config_file, work_dir, *options, "num_workers=1"), tmp_path) as program:
        program.until(lambda: trained(work_dir))
        program.send(signal.SIGINT)
        assert program.wait() == 0, program.text()[-3000:]
    assert "Traceback" not in program.text()
    (last,) = steps(work_dir)
    line = next(line for line in program.text().splitlines() if "stopped by Ctrl-C" in line)
    assert f"stopped by Ctrl-C and saved after step {last} of 30; go on with: python train_scripts/train.py" in line
    command = line.split("go on with: python ")[1].split()
    assert command[-2:] == ["--resume-from", "latest"]
    done = run_program(command)
    assert done.returncode == 0, done.stderr[-2000:]
    run(load_config(config_file, options), tmp_path / "whole")
    assert curve(work_dir) == curve(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(config_file: Path, tmp_path: Path) -> None:
    """In the middle of a step of thousands of micro-batches. Nobody is left behind."""
    work_dir = tmp_path / "run"
    options = ["gradient_accumulation_steps=10000", "train_batch_size=1", "num_workers=1", "last_batch='pad'"]
    with started(train_program(config_file, work_dir, *options), tmp_path) as program:
        program.until(lambda: "samples; global batch" in program.text())
        program.until(lambda: len(children(program.process.pid)) > 0)  # the loading worker: the first step has begun
        program.send(signal.SIGINT)
        program.until(lambda: "Ctrl-C: saving after this step" in program.text())
        program.send(signal.SIGINT)
        assert program.wait() == 130
    assert not trained(work_dir)  # it did not wait for the step to end
    # A loading worker may say that its parent is gone; the run itself ends without a traceback.
    assert "KeyboardInterrupt" not in program.text()
    assert "interrupted" in program.text().splitlines()
    assert steps(work_dir) == []


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both(config_file: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "run"
    options = ["train_batch_size=2", "max_steps=10000", "num_epochs=10000", "save_model_steps=None"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with started([*launcher, *train_program(config_file, work_dir, *options)], tmp_path) as program:
        program.until(lambda: trained(work_dir))
        ranks = children(program.process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGUSR1)
        program.until(lambda: len(steps(work_dir)) == 1)
        os.kill(ranks[1], signal.SIGTERM)
        program.process.wait(300)
    assert program.text().count("error: SIGTERM: saved after step") == 2
    assert "(exitcode: 75)" in program.text() or "exitcode  : 75" in program.text()
    assert len(steps(work_dir)) == 2


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_requests_of_one_rank(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Requests(Ranks("cpu"), tmp_path) as requests:
        requests.send()
        assert requests.agreed() is Request.NONE
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.agreed() is Request.SAVE
        requests.met(Request.SAVE)
        assert requests.agreed() is Request.NONE
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends SIGTERM after the terminal's SIGINT
            os.kill(os.getpid(), number)
        assert requests.agreed() is Request.INTERRUPT
        requests.met(Request.SAVE)
        assert requests.agreed() is Request.INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "c.py", "--resume-from", "x/checkpoint-3", "--work-dir", "a b"])
    assert resume_command(Ranks("cpu")) == "python train.py c.py --work-dir 'a b' --resume-from latest"
    for given in (["--resume_from_checkpoint", "x"], ["--resume_from_checkpoint=x"]):
        monkeypatch.setattr(sys, "argv", ["lora.py", *given, "--rank=4"])
        assert resume_command(Ranks("cpu")) == "python lora.py --rank=4 --resume-from latest"


def test_a_lock_ends_with_its_process_though_its_workers_live(tmp_path: Path) -> None:
    """Loading workers are forked after the lock is taken, and outlive a kill -9 by seconds."""
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom diffusion.files import FolderLock\n"
        f"lock = FolderLock(Path({str(tmp_path)!r}))\n"
        "pid = os.fork()\n"
        # The worker tells its number itself: only then has it given its copy of the lock back.
        "if pid == 0:\n    print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(WorkDirLockedError, match=f'"pid": {process.pid}'):
            FolderLock(tmp_path)
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)
