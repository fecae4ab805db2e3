"""A process that dies or stands still ends the run: named, with stacks, in a set time (exit code 78).

Every process counts what it does (`beat`). A thread of its own publishes the count in the launcher's store, together
with a tick that says the process lives, and reads those of the others. No clocks are compared: a process is dead when
its tick stops, and the one that stands still is the one whose count is behind, not those that wait for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from diffusion.errors import EXIT_PEER_LOST, PeerLostError, PixArtError
from diffusion.ranks import Ranks

_LONG_S = 1800.0  # for what is no training step: validation, saves, the first step with its compilation
_DEAD_AFTER_S = 20.0  # torchrun kills the survivors of a crash after 30 s
_CONNECT_S = 600.0  # processes reach the first step at different times
_GRACE_S = 2.0  # between the first process that finds something and the end of all


@dataclass
class Heartbeat:
    """What a process says about itself. count: of beats; is_step: within a step, where the short timeout holds."""

    rank: int
    host: str
    pid: int
    tick: int = 0
    count: int = 0
    step: int = 0
    phase: str = "start"
    is_step: bool = False
    end: str | None = None  # "done", or why it failed

    def describe(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid}; last seen: {self.phase} of step {self.step})"


@dataclass
class _Seen:
    """A heartbeat and, on our clock, when its tick and its count last changed."""

    beat: Heartbeat
    ticked_at: float
    moved_at: float


class Watchdog:
    """A context around a run; does nothing with one process or without a timeout.

    Args:
        ranks: of the run.
        timeout_s: without progress within a step, after which a process is lost.
        stacks: folder for the stacks of all threads of all processes.
    Raises (on leaving the context):
        PeerLostError: an error here comes from the loss of another process.
    """

    def __init__(self, ranks: Ranks, timeout_s: float | None, stacks: Path) -> None:
        self._ranks, self._timeout_s, self._stacks = ranks, timeout_s or 0.0, stacks
        self._mine = Heartbeat(ranks.rank, socket.gethostname(), os.getpid())
        self._is_on = ranks.world_size > 1 and timeout_s is not None and "MASTER_PORT" in os.environ
        self._dead_after = min(self._timeout_s, _DEAD_AFTER_S)
        self._interval = min(2.0, max(0.2, self._dead_after / 10))
        self._stop = threading.Event()
        self._peers: dict[int, _Seen] = {}
        self._is_terminated = self._is_leaving = False

    def beat(self, step: int, phase: str, *, is_step: bool = True) -> None:
        """Say what this process does now; nearly free."""
        mine = self._mine
        mine.step, mine.phase, mine.is_step, mine.count = step, phase, is_step, mine.count + 1

    # ---- the context ----

    def __enter__(self) -> Watchdog:
        if self._is_on:
            self._run = self._ranks.broadcast(uuid.uuid4().hex)  # no heartbeat of an earlier run or start counts
            faulthandler.enable()
            if threading.current_thread() is threading.main_thread() and _has_no_handler(signal.SIGTERM):
                signal.signal(signal.SIGTERM, self._terminate)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._is_on:
            return
        self._is_leaving = True
        lost = self._lost_behind(error) if error is not None else None
        self._mine.end = "done" if error is None else f"{type(error).__name__}: {str(error)[:300]}"
        self._stop.set()
        self._thread.join(timeout=5)
        if error is None and signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if lost is not None:
            raise PeerLostError(lost) from error

    def _terminate(self, _signal: int, _frame: FrameType | None) -> None:
        """The launcher ends the survivors of a crash so: leave through the context, which says what happened."""
        if not self._is_leaving:
            self._is_terminated = self._is_leaving = True
            raise SystemExit(128 + signal.SIGTERM)

    def _lost_behind(self, error: BaseException) -> str | None:
        """The message of a loss that explains an error here; waits until silence is certain."""
        if isinstance(error, (PixArtError, KeyboardInterrupt)):
            return None
        if not (self._is_terminated or is_communication_error(error)):
            return None
        deadline = time.monotonic() + self._dead_after + 2 * self._interval
        while time.monotonic() < deadline:
            dead = self._find_dead(patience=0.0)
            if dead is not None:
                return dead
            time.sleep(self._interval / 2)
        return None

    # ---- the thread ----

    def _watch(self) -> None:
        try:
            store = self._connect()
            while not self._stop.wait(self._interval):
                self._exchange(store)
                problem = self._find_dead(patience=self._dead_after) or self._find_hang()
                if problem is not None and self._mine.end is None:
                    self._end_run(problem)
            self._exchange(store)  # how this process ended
        except (RuntimeError, OSError) as error:  # the store is the launcher's, or rank 0's
            if not self._stop.wait(self._dead_after):
                self._end_run(
                    f"the launcher or rank 0, which keeps the store of this run, is gone ({error})", all_say=True
                )

    def _connect(self) -> Any:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))
        prefixed = dist.PrefixStore(f"watchdog/{self._run}", store)
        prefixed.set(str(self._mine.rank), json.dumps(asdict(self._mine)))
        return prefixed

    def _exchange(self, store: Any) -> None:
        self._mine.tick += 1
        store.set(str(self._mine.rank), json.dumps(asdict(self._mine)))
        now = time.monotonic()
        for text in store.multi_get([str(rank) for rank in range(self._ranks.world_size)]):
            beat = Heartbeat(**json.loads(text))
            seen = self._peers.get(beat.rank)
            ticked = seen is None or beat.tick != seen.beat.tick
            moved = seen is None or beat.count != seen.beat.count
            self._peers[beat.rank] = _Seen(
                beat, now if ticked or seen is None else seen.ticked_at, now if moved or seen is None else seen.moved_at
            )

    def _find_dead(self, patience: float) -> str | None:
        """Message about processes that no longer tick, or that said why they failed, `patience` seconds ago or more.

        An error of all processes alike is each one's own to report; only who waits for another needs its reason.
        """
        now = time.monotonic()
        for seen in list(self._peers.values()):
            beat = seen.beat
            if beat.rank == self._mine.rank or beat.end == "done":
                continue
            silent = now - seen.ticked_at
            if beat.end is not None and not _is_echo(beat.end) and silent >= patience:
                return f"{beat.describe()} failed: {beat.end}; the run ends and can be resumed from the last save"
            if beat.end is None and silent > self._dead_after:
                return f"{beat.describe()} died; the run ends and can be resumed from the last save"
        return None

    def _find_hang(self) -> str | None:
        """Message about the processes that are behind all others and have not moved for too long."""
        running = [seen for seen in self._peers.values() if seen.beat.end is None]
        if len(running) < self._ranks.world_size:
            return None
        least = min(seen.beat.count for seen in running)
        behind = [seen for seen in running if seen.beat.count == least]
        limit = self._timeout_s if all(seen.beat.is_step for seen in behind) else max(_LONG_S, self._timeout_s)
        still = min(time.monotonic() - seen.moved_at for seen in behind)
        if still <= limit:
            return None
        names = ", ".join(seen.beat.describe() for seen in behind)
        if len(behind) == len(running):
            return f"no process has moved for {still:.0f} s, all at the same point: {names}; suspect network or storage"
        return f"{names}: no progress for {still:.0f} s, the others wait; the run ends and can be resumed"

    def _end_run(self, problem: str, *, all_say: bool = False) -> None:
        """Say it once (the lowest rank that is not to blame), dump all stacks, leave."""
        is_blamed = f"rank {self._mine.rank} on" in problem
        reporters = [rank for rank in sorted(self._peers) if f"rank {rank} on" not in problem]
        self._dump_stacks(is_blamed)
        if all_say or self._mine.rank == (reporters or [0])[0]:
            print(f"error: {problem}; stacks of all processes: {self._stacks}", file=sys.stderr, flush=True)
        time.sleep(_GRACE_S)  # the launcher ends the others as soon as one has left
        os._exit(EXIT_PEER_LOST)

    def _dump_stacks(self, is_blamed: bool) -> None:
        """The stacks of all threads go to a file of this process, and to stderr for the one to blame.

        All processes share that stderr: it gets the text at once, for what faulthandler writes there piece by piece
        would mix with the messages of the others.
        """
        text = ""
        with contextlib.suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._mine.rank}.txt").open("w+") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                text = file.read()
        if is_blamed and text:
            print(text, file=sys.stderr, flush=True)
        elif is_blamed:  # the disk is full, say
            faulthandler.dump_traceback(sys.stderr, all_threads=True)


def is_communication_error(error: BaseException) -> bool:
    """Whether an error looks like a broken connection to another process."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "socket", "process group", "timed out", "broken pipe")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))


def _is_echo(end: str) -> bool:
    """A failure that is itself the consequence of another process's."""
    return end.startswith(
        ("PeerLostError", "SystemExit", "DistBackendError", "DistNetworkError", "RuntimeError: [")
    ) or ("Connection" in end)


def _has_no_handler(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_DFL
