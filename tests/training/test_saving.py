"""What is written when, and what a failing disk does to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion.config import load_config
from diffusion.errors import StorageError
from diffusion.ranks import Ranks
from diffusion.training.saving import Saver, falls_on


class Recorder:
    """In the place of a run's state: notes what is asked of it, or fails like a full disk."""

    def __init__(self, *, full: bool = False) -> None:
        self.step, self.full, self.posthoc, self.written = 0, full, self, []

    def gathered(self, *, keep: bool, checkpoint: bool) -> None:
        assert keep

    def save(self, root: Path, facts: dict[str, Any], *, stored_null_caption: bool, contents: None) -> Path:
        return self._note(f"checkpoint-{facts['samples_seen']}")

    def write(self, folder: Path, step: int, dtype: object, tensors: None) -> None:
        self._note(f"snapshot-{step}")

    def _note(self, name: str) -> Path:
        if self.full:
            raise StorageError("full")
        self.written.append(name)
        return Path(name)


def make_saver(folder: Path, state: Recorder, *options: str) -> Saver:
    (folder / "config.py").write_text("data = dict(type='Store', root='x')\nsave_model_steps = 3\n")
    config = load_config(folder / "config.py", options)
    return Saver(config, Ranks("cpu"), state, folder, 10, steps_per_epoch=100, last_step=8, resumed_from=None)  # type: ignore[arg-type]


def test_steps_on_which_something_falls() -> None:
    assert [step for step in range(1, 9) if falls_on(step, 3, last_step=8)] == [3, 6, 8]
    assert [step for step in range(1, 9) if falls_on(step, None, last_step=8)] == [8]


def test_snapshots_come_before_the_checkpoint_of_their_step(tmp_path: Path) -> None:
    """Killed in between, the run resumes at an earlier step and writes them again; the other way they would lack."""
    state = Recorder()
    saver = make_saver(tmp_path, state, "posthoc_ema.snapshot_every_steps=2")
    for state.step in range(1, 9):
        if saver.is_due():
            saver.save()
    expected = "snapshot-2 checkpoint-30 snapshot-4 snapshot-6 checkpoint-60 snapshot-8 checkpoint-80"
    assert state.written == expected.split()


def test_without_snapshots_only_checkpoints_are_due(tmp_path: Path) -> None:
    state = Recorder()
    saver = make_saver(tmp_path, state, "save_model_steps=None")
    assert [state.step for state.step in range(1, 9) if saver.is_due()] == [8]


def test_two_failed_saves_are_borne_a_third_is_not(tmp_path: Path) -> None:
    state = Recorder(full=True)
    saver = make_saver(tmp_path, state)
    state.step = 3
    for state.full in (True, True, False, True, True):  # a success in between starts the count anew
        saver.save()
    with pytest.raises(StorageError):
        saver.save()


def test_the_last_save_may_not_fail(tmp_path: Path) -> None:
    state = Recorder(full=True)
    saver = make_saver(tmp_path, state)
    state.step = 8
    with pytest.raises(StorageError):
        saver.save()
