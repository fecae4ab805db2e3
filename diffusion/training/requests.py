"""What the world asks of a run while it trains: save now, save and stop. All ranks act on it at the same step.

SIGUSR1 or a file WORK/SAVE_NOW: save and go on. SIGTERM: save and exit 75. First Ctrl-C: save and exit 0; second: stop.
"""

from __future__ import annotations

import enum
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from diffusion.config.cli import RESUME_FLAGS
from diffusion.ranks import Ranks

SAVE_NOW = "SAVE_NOW"


class Request(enum.IntEnum):
    """A higher one wins. torchrun turns Ctrl-C into SIGTERM for its processes, so the interrupt outranks it."""

    NONE = 0
    SAVE = 1
    PREEMPT = 2
    INTERRUPT = 3
    FAIL = 4  # the rank that writes could not save


_SIGNALS = {signal.SIGUSR1: Request.SAVE, signal.SIGTERM: Request.PREEMPT, signal.SIGINT: Request.INTERRUPT}


class Requests:
    """Collects requests of this rank and agrees on them with the others; within its context signals are handled.

    Agreeing costs a step no waiting: the flag of each rank starts on its way before the forward pass, through gloo and
    host memory, and is read after the step. With several ranks a request is therefore met one step later at most.
    """

    def __init__(self, ranks: Ranks, work_dir: Path) -> None:
        self._ranks, self._file = ranks, work_dir / SAVE_NOW
        self._mine, self._pid = Request.NONE, os.getpid()
        self._agreeing: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> Requests:
        # Only the main thread may set handlers; a run in another thread is stopped by its owner.
        in_main = threading.current_thread() is threading.main_thread()
        self._former = {number: signal.signal(number, self._handle) for number in _SIGNALS} if in_main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def ask(self, request: Request) -> None:
        """Raise this rank's request."""
        self._mine = max(self._mine, request)

    def send(self) -> None:
        """Before a step: tell the other ranks what this one is asked."""
        if self._ranks.is_main and self._file.exists():
            self._file.unlink(missing_ok=True)
            self.ask(Request.SAVE)
        if self._ranks.world_size > 1:
            flag = torch.tensor(int(self._mine))
            self._agreeing = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True), flag

    def agreed(self) -> Request:
        """After a step: the highest request of all ranks, the same on each."""
        if self._agreeing is None:
            return self._mine
        work, flag = self._agreeing
        work.wait()
        return Request(int(flag))

    def met(self, request: Request) -> None:
        """It has been acted on; asked again, it is acted on again."""
        if self._mine <= request:
            self._mine = Request.NONE

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loading worker that has just been forked
            return
        request = _SIGNALS[signal.Signals(number)]
        if request is Request.INTERRUPT and self._mine >= Request.INTERRUPT:
            raise KeyboardInterrupt
        self.ask(request)
        if request is Request.INTERRUPT and self._ranks.is_main:
            # Not through logging: the signal may have come in the middle of a line that is being written.
            os.write(2, b"\nCtrl-C: saving after this step, then the run ends; press it again to stop at once\n")


def resume_command(ranks: Ranks) -> str:
    """The command of this process, continued."""
    words = [word for word in sys.argv if not word.startswith(tuple(f"{flag}=" for flag in RESUME_FLAGS))]
    for flag in RESUME_FLAGS:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    launcher = ["python"] if ranks.world_size == 1 else ["torchrun", "--nproc-per-node", str(ranks.local_world_size)]
    return shlex.join([*launcher, *words, "--resume-from", "latest"])
