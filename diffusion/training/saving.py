"""When a run writes its state, how it goes on training meanwhile, and what happens when a save fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoints.training_state import rotate, save_checkpoint
from diffusion.config import TrainConfig
from diffusion.errors import StorageError
from diffusion.ranks import Ranks
from diffusion.training import posthoc_snapshots
from diffusion.training.host_copy import HostCopies
from diffusion.training.posthoc_snapshots import drop_snapshots_after, write_averages
from diffusion.training.run_log import LOGGER
from diffusion.training.state import HostState, RunState

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def falls_on(step: int, every: int | None, last_step: int) -> bool:
    """Whether something is due after a step: every so many steps (None = never), and after the last one."""
    return step == last_step or (every is not None and step % every == 0)


class Background:
    """One job at a time in a thread; what it raised is kept until it is asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job; the one before must be over and its result taken."""
        assert self._thread is None
        # A daemon: a second Ctrl-C ends the process at once, and what the thread leaves behind is removed at the start.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """A job has ended whose result was not taken yet."""
        return self._thread is not None and not self._thread.is_alive()

    def is_idle(self) -> bool:
        return self._thread is None

    def take_result(self) -> BaseException | None:
        """Wait for the job; the error it ended with, if any."""
        assert self._thread is not None
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error


@dataclass
class Saver:
    """Writes checkpoints and post-hoc snapshots of a run, on the main rank, in the background.

    Training waits while the state is copied to host memory, and for a save that is not over when the next one is due.
    A failed save does not stop training, unless it is the last one or `max_failed_saves` failed in a row.

    Args:
        facts: of the run, kept in every checkpoint's trainer.json.
        global_batch: samples an optimiser step.
        steps_per_epoch: optimiser steps.
        last_step: at which everything is saved, whatever the intervals.
        resumed_from: the checkpoint that rotation never deletes.
    """

    config: TrainConfig
    ranks: Ranks
    state: RunState
    work_dir: Path
    facts: dict[str, Any]
    global_batch: int
    steps_per_epoch: int
    last_step: int
    resumed_from: Path | None

    def __post_init__(self) -> None:
        self.checkpoints = self.work_dir / "checkpoints"
        self._snapshots = self.work_dir / posthoc_snapshots.FOLDER
        self._copies = HostCopies(keep=self.ranks.is_main)
        self._writer, self._reserving = Background(), Background()
        self._failed_saves, self._writing, self._is_final = 0, 0, False
        self._fatal: BaseException | None = None
        if self.ranks.is_main:
            drop_snapshots_after(self._snapshots, self.state.step)

    def is_due(self) -> bool:
        """Whether `save` would write something after the current step."""
        return self._snapshot_is_due() or self._checkpoint_is_due()

    def reserve(self) -> None:
        """Allocate in the background what saves copy to, so that the first one waits no longer than others.

        All ranks call it, when the optimizer has its state.
        """
        if self.config.save_async and (self.ranks.is_main or self.state.is_sharded):
            job = self.state.reserve_on_host(self._copies)
            if self.ranks.is_main:
                self._reserving.start(job)

    def save(self, window: dict[str, Any], *, checkpoint: bool = False, final: bool = False) -> None:
        """Copy what is due and write it in the background; all ranks call it.

        Args:
            window: state of the open metrics window.
            checkpoint: write one whether it is due or not.
            final: the run ends with it, so that it may not fail.
        """
        self.state.settle()  # on all ranks alike: it may end the run
        checkpoint, snapshot = checkpoint or self._checkpoint_is_due(), self._snapshot_is_due()
        if not (self.ranks.is_main or self.state.is_sharded):
            return
        self.settle()  # the copies of the save before are read until it is over
        if not self._reserving.is_idle():
            self._reserving.take_result()  # what it failed to allocate is asked for again now
        samples = self.state.step * self.global_batch
        copied = self.state.copy_to_host(self._copies, {**self.facts, "samples_seen": samples, "window": window})
        if not self.ranks.is_main or self._fatal is not None:
            return
        self._writing, self._is_final = copied.step, final or copied.step == self.last_step
        self._writer.start(lambda: self._write(copied, snapshot=snapshot, checkpoint=checkpoint))
        if not self.config.save_async:
            self.settle()

    def is_sound(self) -> bool:
        """Whether the run may go on: False once a save failed that may not, or too many in a row."""
        if self._writer.is_done():
            self.settle()
        return self._fatal is None

    def is_writing(self) -> bool:
        """Whether a save is on its way to the disk."""
        return not (self._writer.is_idle() or self._writer.is_done())

    def settle(self) -> None:
        """Wait for a save that has begun, and take note of how it ended."""
        if self._writer.is_idle():
            return
        error = self._writer.take_result()
        if error is None:
            self._failed_saves = 0
            return
        self._failed_saves += 1
        LOGGER.error("state of step %d was not saved: %s", self._writing, error)
        too_many = self._failed_saves >= self.config.max_failed_saves
        if too_many or self._is_final or not isinstance(error, (StorageError, OSError)):
            self._fatal = error

    def finish(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            StorageError, OSError: the last save failed, or too many in a row.
        """
        self.settle()
        if self._fatal is not None:
            raise self._fatal

    def _snapshot_is_due(self) -> bool:
        settings = self.config.posthoc_ema
        return settings is not None and falls_on(self.state.step, settings.snapshot_every_steps, self.last_step)

    def _checkpoint_is_due(self) -> bool:
        epochs = self.config.save_model_epochs
        intervals = self.config.save_model_steps, None if epochs is None else epochs * self.steps_per_epoch
        return any(falls_on(self.state.step, every, self.last_step) for every in intervals)

    # ---- in the background ----

    def _write(self, copied: HostState, *, snapshot: bool, checkpoint: bool) -> None:
        begin = time.perf_counter()
        # Snapshots first: a run that is killed in between resumes before them and writes them again.
        if snapshot:
            assert copied.posthoc is not None and self.config.posthoc_ema is not None
            write_averages(copied.posthoc, self._snapshots, copied.step, _DTYPES[self.config.posthoc_ema.dtype])
        if not checkpoint:
            return
        stored = self.config.null_caption == "stored"
        folder = save_checkpoint(
            self.checkpoints,
            copied.step,
            copied.nbytes,
            lambda staging: copied.write(staging, stored_null_caption=stored),
        )
        LOGGER.info("saved %s in %.1f s", folder, time.perf_counter() - begin)
        try:  # only now: until the new one is committed, the old ones are all there is
            limit, kept = self.config.checkpoints_total_limit, self.config.checkpoints_keep_every
            rotate(self.checkpoints, limit, keep=self.resumed_from, keep_every=kept)
        except OSError as error:
            LOGGER.warning("an old checkpoint could not be deleted: %s", error)
