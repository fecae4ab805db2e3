"""A save that is killed, or meets a full disk, at every file it touches: the checkpoint before stays whole."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import training_state
from diffusion.checkpoints.training_state import (
    latest_checkpoint,
    list_checkpoints,
    remove_stale,
    require_free_space,
    verify,
)
from diffusion.config import load_config
from diffusion.errors import StorageError
from diffusion.models import PixArt
from diffusion.ranks import Ranks
from diffusion.training.optimization import WeightAverage
from diffusion.training.posthoc_snapshots import PosthocAverages
from diffusion.training.saving import Saver
from diffusion.training.state import RunState
from tests.training.write_faults import in_child, killed_before, watched


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    """Of a real state with everything a checkpoint can hold; checkpoints 1 and 2 are written, the limit is two."""
    return make_saver(tmp_path / "run")


def make_saver(work_dir: Path) -> Saver:
    torch.set_num_threads(1)
    work_dir.mkdir(exist_ok=True)
    (work_dir / "config.py").write_text(
        "data = dict(type='Store', root='x')\ncheckpoints_total_limit = 2\nposthoc_ema = dict(snapshot_every_steps=1)\n"
    )
    torch.manual_seed(0)
    network = PixArt(hidden_size=32, num_heads=2, depth=1, caption_channels=8)
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = RunState(
        network,
        optimizer,
        torch.amp.GradScaler("cpu"),
        WeightAverage(network, 0.9),
        PosthocAverages(network, (0.05, 0.1)),
    )
    config = load_config(work_dir / "config.py", notify=lambda line: None)
    made = Saver(config, Ranks("cpu"), state, work_dir, {}, 10, 100, last_step=8, resumed_from=None)
    for step in (1, 2):
        save(made, step)
    made.finish()
    return made


def save(saver: Saver, step: int) -> None:
    saver.state.step = step
    saver.save({}, checkpoint=True)


@pytest.mark.slow
def test_killed_at_any_operation_a_save_leaves_the_old_state_or_the_new_one(saver: Saver, tmp_path: Path) -> None:
    def job() -> None:
        save(saver, 3)
        saver.finish()

    root, whole, outcomes = tmp_path / "run", tmp_path / "whole", []
    root.rename(whole)
    for number in range(1, 1000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole, root)
        died = killed_before(root, number, job)
        steps = [step for step, _ in list_checkpoints(saver.checkpoints)]
        outcomes.append((*steps, len([*(root / "posthoc_ema").glob("step-0000003*")])))
        assert all(verify(folder) is None for _, folder in list_checkpoints(saver.checkpoints))
        remove_stale(saver.checkpoints)
        found = latest_checkpoint(saver.checkpoints)
        assert found is not None
        assert found.name == f"checkpoint-{steps[-1]}"
        assert not [path for path in saver.checkpoints.iterdir() if not path.name.startswith("checkpoint-")]
        if not died:
            break
    assert number > 50  # files written, synced and hashed, folders, renames, deletions
    # First the snapshots appear, then the checkpoint, and only then the oldest goes; nothing else is ever seen.
    seen = list(dict.fromkeys(outcomes))
    assert seen == [(1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3, 2), (2, 3, 2)]


def test_a_disk_that_is_full_at_any_file_costs_that_save_alone(saver: Saver) -> None:
    paths: list[Path] = []
    with watched(saver.work_dir, lambda event, path: paths.append(path) if event == "write" else None):
        save(saver, 3)
        saver.finish()
    assert {"trainer.json", "manifest.json", "__0_0.distcp", "config.json"} <= {path.name for path in paths}
    before = [step for step, _ in list_checkpoints(saver.checkpoints)]
    for number in range(len(paths)):
        left = [number]

        def full(event: str, path: Path, left: list[int] = left) -> None:
            if event == "write":
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        saver._failed_saves = 0
        with watched(saver.work_dir, full):
            save(saver, 4)
            saver.settle()
        assert (saver._failed_saves, saver.is_sound()) == (1, True), paths[number]
        assert [step for step, _ in list_checkpoints(saver.checkpoints)] == before
        assert not [*saver.checkpoints.glob(".tmp-*")]
    assert verify(saver.checkpoints / "checkpoint-3") is None
    save(saver, 4)  # there is room again
    saver.finish()
    assert verify(saver.checkpoints / "checkpoint-4") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, after which CUDA does not work")
@pytest.mark.parametrize("kilobytes", [4, 40, 80, 130, 260])
def test_a_file_that_may_not_grow_is_a_storage_error_in_one_line(kilobytes: int, saver: Saver) -> None:
    """The limit stops config.json, the snapshots, the weights or the optimiser in the middle of their bytes."""

    def job() -> list[object]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))
        save(saver, 8)  # the last one: its error ends the run
        try:
            saver.finish()
        except (StorageError, OSError) as error:
            return [type(error).__name__, str(error)]
        return []

    sizes = {path.name: path.stat().st_size >> 10 for path in saver.checkpoints.rglob("*") if path.is_file()}
    assert any(kilobytes < size for size in sizes.values()), sizes
    code, (kind, text) = in_child(job)
    assert code == 0
    assert kind in ("StorageError", "OSError")
    assert "\n" not in text
    assert [step for step, _ in list_checkpoints(saver.checkpoints)] == [1, 2]
    assert not [*saver.checkpoints.glob(".tmp-*")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = make_saver(small_disk / "run")
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - (200 << 10)))
    with pytest.raises(StorageError, match=r"a checkpoint needs \d+ MiB, .*checkpoints has 0 MiB free; make room"):
        require_free_space(saver.checkpoints, 1 << 20)
    # Nobody asked before: the disk fills up while the files are written.
    monkeypatch.setattr(training_state, "require_free_space", lambda root, needed: None)
    monkeypatch.setattr("diffusion.training.posthoc_snapshots.require_free_space", lambda root, needed: None)
    save(saver, 8)
    with pytest.raises((StorageError, OSError), match="No space left|could not be written"):
        saver.finish()
    assert [step for step, _ in list_checkpoints(saver.checkpoints)] == [1, 2]
    assert all(verify(folder) is None for _, folder in list_checkpoints(saver.checkpoints))
    assert not [*saver.checkpoints.glob(".tmp-*")]
