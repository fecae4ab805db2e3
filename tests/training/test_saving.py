"""What is written when, how training goes on meanwhile, and what a failing disk does to a run."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.config import load_config
from diffusion.errors import StorageError
from diffusion.ranks import Ranks
from diffusion.training import saving
from diffusion.training.host_copy import HostCopies
from diffusion.training.saving import Saver, falls_on
from tests.training.tiny_run import run, write_config


class Recorder:
    """In the place of a run's state: notes what is written of it, waits at a gate, or fails like a full disk."""

    is_sharded = False
    nbytes = 10

    def __init__(self) -> None:
        self.step, self.full, self.written, self.posthoc = 0, False, [], {}
        self.gate = threading.Event()
        self.gate.set()

    def settle(self) -> None: ...

    def copy_to_host(self, copies: HostCopies, facts: dict[str, Any]) -> Recorder:
        copy = Recorder()
        copy.step, copy.full, copy.written, copy.gate, copy.facts = self.step, self.full, self.written, self.gate, facts
        return copy

    def write(self, folder: Path, *, stored_null_caption: bool) -> None:
        self.gate.wait()
        if self.full:
            raise StorageError("full")
        self.written.append(f"checkpoint-{self.step}")
        (folder / "trainer.json").write_text(json.dumps(self.facts))


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(
        saving, "write_averages", lambda averages, folder, step, dtype: recorder.written.append(f"snapshot-{step}")
    )
    return recorder


def make_saver(folder: Path, state: Recorder, *options: str) -> Saver:
    (folder / "config.py").write_text("data = dict(type='Store', root='x')\nsave_model_steps = 3\n")
    config = load_config(folder / "config.py", options)
    return Saver(config, Ranks("cpu"), state, folder, {"seed": 1}, 10, 100, last_step=8, resumed_from=None)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_steps_on_which_something_falls() -> None:
    assert [step for step in range(1, 9) if falls_on(step, 3, last_step=8)] == [3, 6, 8]
    assert [step for step in range(1, 9) if falls_on(step, None, last_step=8)] == [8]


def test_snapshots_come_before_the_checkpoint_of_their_step(state: Recorder, tmp_path: Path) -> None:
    """Killed in between, the run resumes at an earlier step and writes them again; the other way they would lack."""
    saver = make_saver(tmp_path, state, "posthoc_ema.snapshot_every_steps=2")
    for state.step in range(1, 9):
        if saver.is_due():
            saver.save({"steps": 0})
    saver.finish()
    expected = "snapshot-2 checkpoint-3 snapshot-4 snapshot-6 checkpoint-6 snapshot-8 checkpoint-8"
    assert state.written == expected.split()
    record = json.loads((tmp_path / "checkpoints/checkpoint-6/trainer.json").read_text())
    assert record == {"seed": 1, "samples_seen": 60, "window": {"steps": 0}}


def test_without_snapshots_only_checkpoints_are_due(state: Recorder, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, state, "save_model_steps=None")
    assert [state.step for state.step in range(1, 9) if saver.is_due()] == [8]


def test_training_goes_on_while_a_save_is_written_and_nothing_old_goes_before_it_is_committed(
    state: Recorder, tmp_path: Path
) -> None:
    saver = make_saver(tmp_path, state, "checkpoints_total_limit=2")
    for state.step in (1, 2):
        saver.save({}, checkpoint=True)
    saver.settle()
    state.gate.clear()  # the disk is slow from now on
    state.step = 3
    saver.save({}, checkpoint=True)  # returns at once
    assert saver.is_sound()
    visible = [name for name in names(tmp_path) if not name.startswith(".tmp-checkpoint-3-")]
    assert visible == ["checkpoint-1", "checkpoint-2"]  # neither is the new one there, nor the oldest deleted
    state.gate.set()
    saver.finish()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_a_save_waits_for_the_one_before(state: Recorder, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, state)
    state.gate.clear()
    state.step = 1
    saver.save({}, checkpoint=True)
    threading.Timer(0.2, state.gate.set).start()
    state.step = 2
    saver.save({}, checkpoint=True)
    assert state.written[0] == "checkpoint-1"  # committed before the second was copied
    saver.finish()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_without_save_async_a_save_returns_when_it_is_on_the_disk(state: Recorder, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, state, "save_async=False")
    state.step = 3
    saver.save({})
    assert names(tmp_path) == ["checkpoint-3"]


def test_milestones_outlive_the_limit(state: Recorder, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, state, "checkpoints_total_limit=2", "checkpoints_keep_every=4")
    for state.step in range(1, 8):
        saver.save({}, checkpoint=True)
    saver.finish()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(
    state: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("busy")

    saver = make_saver(tmp_path, state, "max_failed_saves=1")
    monkeypatch.setattr(saving, "rotate", fails)
    state.step = 3
    saver.save({})
    saver.finish()
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("mode", ["save_async=True", "save_async=False"])
def test_two_failed_saves_are_borne_a_third_is_not(mode: str, state: Recorder, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, state, mode)
    for state.step, state.full in enumerate(
        (True, True, False, True, True), start=1
    ):  # a success begins the count anew
        saver.save({}, checkpoint=True)
    saver.settle()
    assert saver.is_sound()
    state.step = 6
    saver.save({}, checkpoint=True)
    with pytest.raises(StorageError):
        saver.finish()
    assert not saver.is_sound()
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_run_can_be_told_to_bear_no_failed_save(state: Recorder, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, state, "max_failed_saves=1")
    state.step, state.full = 1, True
    saver.save({}, checkpoint=True)
    with pytest.raises(StorageError):
        saver.finish()


@pytest.mark.parametrize(("step", "final"), [(8, False), (5, True)])
def test_the_last_save_may_not_fail(step: int, final: bool, state: Recorder, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, state)
    state.step, state.full = step, True
    saver.save({}, checkpoint=True, final=final)
    with pytest.raises(StorageError):
        saver.finish()


def test_copies_do_not_follow_their_tensors_and_are_reused() -> None:
    copies, weight = HostCopies(), torch.ones(3)
    tree = {"weights": {"w": weight}, "groups": [{"lr": 0.1, "betas": (0.9, torch.tensor(2))}], "none": None}
    taken = copies.take(tree)
    weight.mul_(5)
    assert taken["weights"]["w"].tolist() == [1, 1, 1]
    assert taken["groups"] == [{"lr": 0.1, "betas": (0.9, torch.tensor(2))}]
    again = copies.take(tree)
    assert again["weights"]["w"] is taken["weights"]["w"]
    assert again["weights"]["w"].tolist() == [5, 5, 5]
    assert HostCopies(keep=False).take(tree)["weights"] == {"w": None}


def test_the_first_copy_fills_what_was_reserved() -> None:
    copies, tree = HostCopies(), {"w": torch.ones(3), "averaged": None, "groups": [{"step": torch.tensor(2)}]}
    copies.reserve(tree)
    reserved = {name: buffer.data_ptr() for name, buffer in copies._buffers.items()}
    taken = copies.take(tree)
    assert taken["w"].tolist() == [1, 1, 1] and taken["groups"][0]["step"] == 2
    assert {"/w": taken["w"].data_ptr(), "/groups/0/step": taken["groups"][0]["step"].data_ptr()} == reserved
    nothing = HostCopies(keep=False)
    nothing.reserve(tree)
    assert not nothing._buffers


def test_a_save_waits_for_the_memory_that_is_being_reserved(state: Recorder, tmp_path: Path) -> None:
    saver, begun = make_saver(tmp_path, state), threading.Event()

    def reserve() -> None:
        begun.set()
        state.gate.wait()
        raise MemoryError("no memory")  # what is missing is asked for again, and reported, by the save itself

    state.reserve_on_host = lambda copies: reserve  # type: ignore[attr-defined]
    state.gate.clear()
    saver.reserve()
    assert begun.wait(10)
    assert saver.is_sound() and not saver.is_writing()
    state.step = 3
    waiting = threading.Thread(target=saver.save, args=({},))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    state.gate.set()
    waiting.join(10)
    saver.finish()
    assert names(tmp_path) == ["checkpoint-3"]


def test_no_save_of_a_run_allocates_its_copy(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []

    class Watched(HostCopies):
        def take(self, tree: Any) -> Any:
            before = dict(self._buffers)
            taken = super().take(tree)
            assert len(before) > 50
            allocated.extend(name for name, buffer in self._buffers.items() if before.get(name) is not buffer)
            return taken

    monkeypatch.setattr(saving, "HostCopies", Watched)
    run(load_config(write_config(tmp_path / "config.py", parts)), tmp_path / "run")
    assert not allocated


def test_sharded_state_is_saved_whole_and_loaded_into_shards(tmp_path: Path) -> None:
    """FSDP2 on one gloo process: its parameters and moments are DTensors, its checkpoint is that of a plain run."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from diffusion.checkpoints import read_transformer
    from diffusion.models import PixArt
    from diffusion.training.state import RunState

    def make() -> RunState:
        torch.manual_seed(0)
        network = PixArt(hidden_size=32, num_heads=2, depth=1, caption_channels=8)
        if dist.is_initialized():
            fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
        return RunState(network, torch.optim.AdamW(network.parameters(), lr=0.1), torch.amp.GradScaler("cpu"), None)

    def step(state: RunState) -> None:
        for index, parameter in enumerate(state.network.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + index)
        state.optimizer.step()
        state.step += 1

    plain = make()
    step(plain)
    facts: dict[str, Any] = {"window": None}
    plain.copy_to_host(HostCopies(), facts).write(tmp_path / "plain", stored_null_caption=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharded = make()
        assert sharded.is_sharded
        step(sharded)
        sharded.copy_to_host(HostCopies(), facts).write(tmp_path / "sharded", stored_null_caption=True)
        fresh = make()
        fresh._restore_optimizer(tmp_path / "plain/training_state")
        moments = [entry["exp_avg"] for entry in fresh.optimizer.state.values()]
        assert all(isinstance(moment, DTensor) for moment in moments)
        expected = [entry["exp_avg"] for entry in plain.optimizer.state.values()]
        assert all(torch.equal(moment.full_tensor(), value) for moment, value in zip(moments, expected))
    finally:
        dist.destroy_process_group()
    _, one = read_transformer(tmp_path / "plain")
    _, other = read_transformer(tmp_path / "sharded")
    assert all(torch.equal(one[key], other[key]) for key in one)
    restored = make()
    restored.restore(tmp_path / "sharded")
    assert all(
        torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
        for a, b in zip(restored.optimizer.state.values(), plain.optimizer.state.values())
    )
