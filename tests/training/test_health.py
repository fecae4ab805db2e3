"""Skips, spikes, memory and faults of one process; the same with many is in test_parallel.py."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from diffusion.config import load_config
from diffusion.data import SampleKey
from diffusion.data.store_dataset import StoreDataset
from diffusion.errors import CheckpointError, ConfigError, DeviceMemoryError, NumericalError
from diffusion.ranks import Ranks
from diffusion.training import replay_step
from diffusion.training.equality import checksum, first_difference
from diffusion.training.faults import Faults, parse_faults
from diffusion.training.health import SpikeMonitor, memory_switches, slow_ranks
from diffusion.training.muon import muon
from diffusion.training.optimization import parameter_groups, update_unless
from tests.training.parallel_worker import SMALL
from tests.training.tiny_run import curve, run


def test_features_with_nan_are_skipped_recorded_and_reproduced(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = StoreDataset.__getitem__

    def spoiled(self: StoreDataset, key: SampleKey):  # type: ignore[no-untyped-def]
        sample = original(self, key)
        if key.number in (9, 13):
            sample.latents_mean = sample.latents_mean * float("nan")
        return sample

    monkeypatch.setattr(StoreDataset, "__getitem__", spoiled)
    trainer = run(load_config(config_file, [*SMALL, "max_steps=5"]), tmp_path / "run")
    assert sorted(curve(tmp_path / "run")) == [1, 2, 5]
    assert (trainer.state.step, trainer.state.skipped_steps, trainer.state.updates) == (5, 2, 3)
    replay = tmp_path / "run/replay/step-0000003/replay.json"
    bad = json.loads(replay.read_text())["parts"][0]["samples"][1]
    replay_step(replay)
    said = capsys.readouterr().out
    assert f"{bad['key']} (number 9, t " in said
    assert "latents_mean holds NaN or infinity" in said
    assert said.count("(number") == 1
    assert "reproduced" in said
    with pytest.raises(CheckpointError, match="step-0000003/replay.json"):  # weights of the first skipped step alone
        replay_step(tmp_path / "run/replay/step-0000004/replay.json")


def test_one_percent_of_skipped_steps_ends_the_run_and_keeps_the_last_save(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", ";".join(f"nan@step={step}" for step in range(2, 40, 2)))
    options = [*SMALL, "max_steps=40", "save_model_steps=5", "validation.num_samples=0"]
    with pytest.raises(NumericalError, match="11 of the last 1000 steps") as error:
        run(load_config(config_file, options), tmp_path / "run")
    assert error.value.exit_code == 77
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == [5, 10, 15, 20]
    monkeypatch.setenv("FAULT", "")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # this process still holds the lock of the failed run
    resumed = run(load_config(config_file, [*options, "max_steps=22"]), tmp_path / "copy", resume_from="latest")
    assert resumed.state.skipped_steps == 10


def test_a_spike_is_one_event() -> None:
    rng = random.Random(0)
    values = [math.exp(rng.gauss(0, 0.1)) for _ in range(10_000)]
    monitor = SpikeMonitor(6.0)
    events = [step for step, value in enumerate(values) if monitor.add(value) is not None]
    assert len(events) <= 1
    monitor = SpikeMonitor(6.0)
    with_spike = [*values[:30], 3.0, 2.9, *values[30:60]]
    assert [step for step, value in enumerate(with_spike) if monitor.add(value) is not None] == [30]


def test_slow_ranks_are_those_beyond_one_and_a_half_medians() -> None:
    assert slow_ranks([1.0, 1.1, 0.9, 1.0]) == set()
    assert slow_ranks([1.0, 1.6]) == {1}
    assert slow_ranks([1.6, 1.0, 1.0, 3.0]) == {0, 3}


def test_out_of_memory_says_what_helps(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "oom@step=4")
    with pytest.raises(DeviceMemoryError) as error:
        run(load_config(config_file, SMALL), tmp_path / "run")
    text = str(error.value)
    assert "train_batch_size=4 at 32 px" in text
    assert text.index("mixed_precision='bf16'") < text.index("policy='selective'") < text.index("all blocks")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-3"]
    spent = ["mixed_precision='bf16'", "grad_checkpointing=True", "ema_rate=None"]
    assert memory_switches(load_config(config_file, spent), Ranks())[0].startswith("train_batch_size=2")


def test_faults_are_inert_unless_set(capsys: pytest.CaptureFixture[str]) -> None:
    for environment in ({}, {"FAULT": "kill@step=1", "TORCHELASTIC_RESTART_COUNT": "1"}, {"FAULT": "kill@rank=1"}):
        Faults(0, environment).before_forward(1)
    assert capsys.readouterr().err == ""
    Faults(1, {"FAULT": "nan@step=5,rank=1;hang@step=7"})
    assert "FAULT INJECTION on rank 1" in capsys.readouterr().err
    assert [fault.kind for fault in parse_faults("nan@step=5,rank=1;hang@step=7")] == ["nan", "hang"]
    for wrong, remedy in (("nam@step=1", "did you mean 'nan'"), ("nan@step=x", "NAME=NUMBER")):
        with pytest.raises(ConfigError, match=remedy):
            parse_faults(wrong)


def test_a_scaled_step_that_overflows_changes_nothing_but_the_scale() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler("cpu", init_scale=8.0)
    for skip, scale in ((0.0, 8.0), (1.0, 4.0), (0.0, 4.0)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(weight.square().sum()).backward()
        scaler.unscale_(optimizer)
        update_unless(torch.tensor(skip), optimizer, scaler)
        assert torch.equal(weight, before) == bool(skip)
        assert scaler.get_scale() == scale
    assert optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("skipped", [0, 2])  # the very first step of a run, and one with momentum
def test_muon_leaves_a_step_out_without_asking_the_host(skipped: int) -> None:
    def train(skipped: int, steps: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 4))
        optimizer = muon(network, parameter_groups(network, 0.1), 1e-2, "1.", eps=1e-8)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in range(steps):
            optimizer.zero_grad()
            network(torch.ones(2, 6)).square().sum().backward()
            skip = torch.tensor(float(step == skipped))
            if skip:
                for parameter in network.parameters():
                    parameter.grad.fill_(torch.nan)
            update_unless(skip, optimizer, scaler)
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [*network.parameters(), *states]

    found, expected = train(skipped, 4), train(99, 3)  # as if the step had not been
    assert len(found) == len(expected) == 4 + 2 + 3 * 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_checksums_see_every_bit() -> None:
    tensor = torch.randn(7, 3)
    changed = tensor.clone()
    changed.view(torch.int32)[3, 1] ^= 1
    assert checksum(tensor) != checksum(changed)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())
    sums = [[("a", None, 1), ("b", (0,), 2)], [("a", None, 1), ("b", (1,), 3)], [("a", None, 1), ("b", (0,), 5)]]
    assert first_difference(sums) == ("b", 2, 0)  # ranks 0 and 2 hold the same shard
    assert first_difference([[("a", None, 9)], [("a", None, 1)], [("a", None, 1)]]) == ("a", 0, 1)
    assert first_difference([[("a", None, 1)]] * 3) is None
