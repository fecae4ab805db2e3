"""`lora` in a config: train.py's Trainer on an adapter, with an average, resumed, and on two processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.adapters import PEFT_WEIGHTS
from diffusion.config import load_config
from diffusion.errors import CheckpointError, ConfigError
from diffusion.training import replay_step
from tests.programs import run_program
from tests.training.tiny_run import curve, run, weights

OPTIONS = ["lora.rank=2", "hidden_size=32", "num_heads=2", "depth=1", "max_steps=4", "save_model_steps=2"]


def adapter_config(config_file: Path, parts: Path, *options: str):  # type: ignore[no-untyped-def]
    base = f"load_from={str(parts / 'pipe')!r}"
    return load_config(config_file, [*OPTIONS, base, *options], notify=lambda line: None)


def test_average_and_resume(config_file: Path, parts: Path, tmp_path: Path) -> None:
    run(adapter_config(config_file, parts), tmp_path / "whole")
    run(adapter_config(config_file, parts, "max_steps=2"), tmp_path / "cut")
    run(adapter_config(config_file, parts), tmp_path / "cut", resume_from="latest")
    for place in ("", "lora_ema/", "../../"):  # trained, averaged, exported
        files = [tmp_path / name / "checkpoints/checkpoint-4" / f"{place}{PEFT_WEIGHTS}" for name in ("whole", "cut")]
        whole, resumed = (load_file(path) for path in files)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    folder = tmp_path / "whole"
    average = load_file(folder / "checkpoints/checkpoint-4/lora_ema" / PEFT_WEIGHTS)
    exported = load_file(folder / PEFT_WEIGHTS)
    assert all(torch.equal(exported[key], average[key]) for key in exported)
    assert curve(folder).keys() == {1, 2, 3, 4}
    assert curve(folder, "validation_loss").keys() == {4}
    with pytest.raises(FileNotFoundError):
        weights(folder, 4)  # a checkpoint holds no copy of the frozen network


def test_mistakes(config_file: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora needs load_from"):
        run(adapter_config(config_file, parts, "load_from=None"), tmp_path / "none")
    with pytest.raises(ConfigError, match=r"posthoc_ema.*averages whole networks"):
        adapter_config(config_file, parts, "posthoc_ema={'snapshot_every_steps': 2}")
    run(adapter_config(config_file, parts, "max_steps=2"), tmp_path / "run")
    other = adapter_config(config_file, parts, "lora.rank=3")
    with pytest.raises(ConfigError, match=r"lora\.rank 2 -> 3"):
        run(other, tmp_path / "run", resume_from="latest")
    with pytest.raises(CheckpointError, match=r"has 17 layers of rank 2, this run 17 layers of rank 3"):
        run(other, tmp_path / "run", resume_from="latest", allow_config_change=True)


def test_another_base_is_refused(config_file: Path, parts: Path, tmp_path: Path) -> None:
    run(adapter_config(config_file, parts, "max_steps=2"), tmp_path / "run")
    shutil.copytree(parts / "pipe", tmp_path / "moved")
    moved = f"load_from={str(tmp_path / 'moved')!r}"
    run(adapter_config(config_file, parts, "max_steps=3", moved), tmp_path / "run", resume_from="latest")
    path = tmp_path / "moved/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConfigError, match="was trained with another fingerprint of base"):
        run(adapter_config(config_file, parts, moved), tmp_path / "run", resume_from="latest")


def test_a_skipped_step_of_an_adapter_is_recorded_and_replayed(
    config_file: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULT", "nan@step=2")
    run(adapter_config(config_file, parts), tmp_path / "run")
    replay = tmp_path / "run/replay/step-0000002/replay.json"
    assert (replay.parent / PEFT_WEIGHTS).is_file()
    replay_step(replay)
    assert "the step is finite here" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(config_file: Path, parts: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, f"load_from={str(parts / 'pipe')!r}"]
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        train = ["train_scripts/train.py", str(config_file), "--work-dir", str(tmp_path / name), "--report_to", "none"]
        done = run_program([*launch, *train, "--cfg-options", *options, f"train_batch_size={batch}"])
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / PEFT_WEIGHTS) for name in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-6)
