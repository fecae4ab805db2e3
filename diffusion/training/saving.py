"""When a run writes its state, and what happens when that fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion.checkpoints.training_state import rotate
from diffusion.config import TrainConfig
from diffusion.errors import StorageError
from diffusion.ranks import Ranks
from diffusion.training import posthoc_snapshots
from diffusion.training.posthoc_snapshots import drop_snapshots_after
from diffusion.training.run_log import LOGGER
from diffusion.training.state import Contents, RunState

# A save that fails is logged and retried at the next interval; after this many in a row the run stops (exit 74).
_MAX_FAILED_SAVES = 3
_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def falls_on(step: int, every: int | None, last_step: int) -> bool:
    """Whether something is due after a step: every so many steps (None = never), and after the last one."""
    return step == last_step or (every is not None and step % every == 0)


@dataclass
class Saver:
    """Writes checkpoints and post-hoc snapshots of a run, on the main rank; the others wait.

    Args:
        global_batch: samples an optimiser step.
        last_step: at which everything is saved, whatever the intervals.
        resumed_from: the checkpoint that rotation never deletes.
    """

    config: TrainConfig
    ranks: Ranks
    state: RunState
    work_dir: Path
    global_batch: int
    steps_per_epoch: int
    last_step: int
    resumed_from: Path | None

    def __post_init__(self) -> None:
        self._snapshots = self.work_dir / posthoc_snapshots.FOLDER
        self._failed_saves = 0
        if self.ranks.is_main:
            drop_snapshots_after(self._snapshots, self.state.step)

    def is_due(self) -> bool:
        """Whether `save` would write something after the current step."""
        return self._snapshot_is_due() or self._checkpoint_is_due()

    def save(self) -> None:
        """Write what is due. A full disk does not stop training before the last step: earlier files stay valid.

        Raises:
            StorageError, OSError: it failed at the last step, or too often in a row.
        """
        contents = self.state.gathered(keep=self.ranks.is_main, checkpoint=self._checkpoint_is_due())
        if self.ranks.is_main:
            try:
                # Snapshots first: a run that is killed in between resumes before them and writes them again.
                if self._snapshot_is_due():
                    self._write_snapshots(contents)
                if self._checkpoint_is_due():
                    self._write_checkpoint(contents)
                self._failed_saves = 0
            except Exception as error:
                self._failed_saves += 1
                LOGGER.error("state of step %d was not saved: %s", self.state.step, error)
                stop = self.state.step == self.last_step or self._failed_saves >= _MAX_FAILED_SAVES
                if stop or not isinstance(error, (StorageError, OSError)):
                    raise
        self.ranks.barrier()

    def _snapshot_is_due(self) -> bool:
        settings = self.config.posthoc_ema
        return settings is not None and falls_on(self.state.step, settings.snapshot_every_steps, self.last_step)

    def _checkpoint_is_due(self) -> bool:
        epochs = self.config.save_model_epochs
        intervals = self.config.save_model_steps, None if epochs is None else epochs * self.steps_per_epoch
        return any(falls_on(self.state.step, every, self.last_step) for every in intervals)

    def _write_snapshots(self, contents: Contents | None) -> None:
        assert self.state.posthoc is not None and self.config.posthoc_ema is not None
        dtype, whole = _DTYPES[self.config.posthoc_ema.dtype], contents.posthoc if contents is not None else None
        self.state.posthoc.write(self._snapshots, self.state.step, dtype, whole)

    def _write_checkpoint(self, contents: Contents | None) -> None:
        checkpoints = self.work_dir / "checkpoints"
        facts = {
            "samples_seen": self.state.step * self.global_batch,
            "steps_per_epoch": self.steps_per_epoch,
            "seed": self.config.seed,
            "world_size": self.ranks.world_size,
            "config": self.config.model_dump(mode="json"),
        }
        stored = self.config.null_caption == "stored"
        folder = self.state.save(checkpoints, facts, stored_null_caption=stored, contents=contents)
        rotate(checkpoints, self.config.checkpoints_total_limit, keep=self.resumed_from)
        LOGGER.info("saved %s", folder)
