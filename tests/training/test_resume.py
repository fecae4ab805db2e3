"""A run that was interrupted ends as if it never was: weights, averages, moments, log lines, the order of samples."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion.checkpoints.training_state import FORMAT_VERSION, verify
from diffusion.config import TrainConfig, load_config
from diffusion.files import hash_file
from diffusion.training import Reporting, Trainer, denoising_objective
from tests.programs import run_program
from tests.training.test_trainer import train_program
from tests.training.tiny_run import curve, run, weights

CELLS = [
    ["log_interval=4"],
    ["log_interval=5", "gradient_accumulation_steps=2", "train_batch_size=2", "posthoc_ema.snapshot_every_steps=2"],
    pytest.param(["log_interval=4", "num_workers=2", "save_async=False"], marks=pytest.mark.slow),
    pytest.param(["log_interval=4", "ema_rate=None", "mixed_precision='bf16'"], marks=pytest.mark.slow),
    pytest.param(["log_interval=7", "train_batch_size=12", "last_batch='drop'"], marks=pytest.mark.slow),
]


def disturb_global_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every step: whatever drew from one of these would draw other numbers than the uninterrupted run."""
    original, chance = Trainer._train_step, random.SystemRandom()

    def step(trainer: Trainer, *arguments: Any) -> Any:
        seed = chance.randrange(1 << 32)
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_train_step", step)


def same_end(one: Trainer, other: Trainer) -> bool:
    """Whether two runs hold equal weights, averages and moments, bit for bit."""

    def tensors(trainer: Trainer) -> list[torch.Tensor]:
        state = trainer.state
        found = [*state.network.state_dict().values()]
        found += state.average.tensors.values() if state.average is not None else []
        for average in state.posthoc.tensors.values() if state.posthoc is not None else []:
            found += average.values()
        return found + [value for entry in state.optimizer.state.values() for value in entry.values()]

    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return len(pairs) > 100 and all(torch.equal(a, b) for a, b in pairs)


class Crash(Exception):
    """In the place of whatever ends a process."""


def interrupted(config: TrainConfig, work_dir: Path, after: int, **options: Any) -> None:
    """A run that ends after a step without warning; the save that has begun by then comes to its end."""
    trainer = Trainer(config, denoising_objective, work_dir, reporting=Reporting(tensorboard=False), **options)
    original = trainer._train_step

    def step(*arguments: Any) -> Any:
        if trainer.state.step == after:
            raise Crash
        return original(*arguments)

    trainer._train_step = step  # type: ignore[method-assign]
    with pytest.raises(Crash):
        trainer.fit()
    trainer.lock.release()


@pytest.mark.parametrize("options", CELLS)
def test_three_pieces_equal_one_run(
    options: list[str], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut between log lines and inside an epoch; no generator of torch, numpy or Python is restored."""
    config = load_config(config_file, ["save_model_steps=2", *options])
    whole = run(config, tmp_path / "whole")
    disturb_global_generators(monkeypatch)
    cut = tmp_path / "cut"
    interrupted(config, cut, after=3)
    interrupted(config, cut, after=5, resume_from="latest")
    end = run(config, cut, resume_from="latest")
    assert end.first_step == 4
    assert same_end(end, whole)
    for key in ("loss", "grad_norm", "lr", "epoch"):
        assert curve(cut, key) == curve(tmp_path / "whole", key)


def test_tensorboard_shows_every_step_once(config_file: Path, tmp_path: Path) -> None:
    """Two lives: the first was lost after step 5, the second went on from step 3."""
    for options, resume in ((["max_steps=5"], None), (["max_steps=6"], "latest")):
        config = load_config(config_file, [*options, "validation.every_steps=2"])
        reporting = Reporting(project_name="p")
        Trainer(config, denoising_objective, tmp_path / "run", resume_from=resume, reporting=reporting).fit()
        shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-5", ignore_errors=True)
    events = EventAccumulator(str(tmp_path / "run/logs/p"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 4, 6]
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(curve(tmp_path / "run"), rel=1e-6)


def test_events_are_on_the_disk_when_a_checkpoint_is(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's writer keeps events for two minutes; a run killed after a save would lack those before it."""
    config = load_config(config_file, ["max_steps=4", "save_model_steps=3"])
    trainer = Trainer(config, denoising_objective, tmp_path / "run", reporting=Reporting(project_name="p"))
    monkeypatch.setattr(Trainer, "_close", lambda trainer, saver, request: saver.finish())  # as if it were killed
    trainer.fit()
    events = EventAccumulator(str(tmp_path / "run/logs/p"))
    events.Reload()
    assert {1, 2, 3} <= {event.step for event in events.Scalars("loss")}


def test_checkpoints_of_the_first_format_go_on(config_file: Path, tmp_path: Path) -> None:
    whole = run(load_config(config_file), tmp_path / "whole")
    run(load_config(config_file, ["max_steps=3"]), tmp_path / "old")
    folder = tmp_path / "old/checkpoints/checkpoint-3"
    record = json.loads((folder / "trainer.json").read_text())
    assert record["format_version"] == FORMAT_VERSION == 2
    for key in ("window", "data"):
        del record[key]
    for key in ("save_async", "max_failed_saves", "checkpoints_keep_every"):
        del record["config"][key]
    (folder / "trainer.json").write_text(json.dumps(record | {"format_version": 1}))
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "trainer.json"
    manifest["files"]["trainer.json"] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    assert verify(folder) is None
    assert same_end(run(load_config(config_file), tmp_path / "old", resume_from="latest"), whole)


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped_and_back(config_file: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 1 processes, and another accumulation: the same samples in the same order, the same curve."""
    run(load_config(config_file), tmp_path / "whole")
    moved = tmp_path / "moved"
    interrupted(load_config(config_file, ["log_interval=2"]), moved, after=3)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["train_batch_size=2", "max_steps=4", "resume_from.checkpoint=latest", "log_interval=2"]
    done = run_program([*launcher, *train_program(config_file, moved, *options)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "config changed since the checkpoint: train_batch_size 4 -> 2" in done.stdout
    options = ["train_batch_size=1", "gradient_accumulation_steps=4", "log_interval=2"]
    run(load_config(config_file, options), moved, resume_from="latest")
    expected, found = curve(tmp_path / "whole"), curve(moved)
    assert sorted(found) == [2, 4, 6]
    for step, loss in found.items():  # the line of step 4 has a step of one process and a step of two
        assert loss == pytest.approx((expected[step - 1] + expected[step]) / 2, rel=1e-5)
    one, other = weights(tmp_path / "whole", 6), weights(moved, 6)
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-5)
