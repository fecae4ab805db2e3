"""Snapshots of real runs: what they hold, what resuming keeps, and the averages that are made of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from diffusion.checkpoints import load_transformer
from diffusion.config import load_config
from diffusion.errors import CheckpointError, ConfigError, StorageError
from diffusion.training.posthoc_ema import Profile, combine, gamma_of
from diffusion.training.posthoc_snapshots import (
    PosthocAverages,
    drop_snapshots_after,
    list_snapshots,
    mix_snapshots,
    reconstruct,
    snapshot_path,
)
from tests.programs import run_program
from tests.training.tiny_run import run, write_config

OPTIONS = ["posthoc_ema.snapshot_every_steps=2", "ema_rate=None"]


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.py and run/: 5 steps, checkpoints at 3 and 5, snapshots at 2, 4 and 5."""
    root = tmp_path_factory.mktemp("posthoc")
    run(load_config(write_config(root / "config.py", parts), [*OPTIONS, "max_steps=5"]), root / "run")
    return root


def toy_sequences(steps: int) -> np.ndarray:
    """(steps, 4) weights of a training: decaying, oscillating, a random walk, noise around a value."""
    time, generator = np.arange(1, steps + 1), np.random.default_rng(1)
    walk = np.cumsum(generator.standard_normal(steps)) * 0.1
    noise = 3 + generator.standard_normal(steps)
    return np.stack([5 + np.exp(-time / 50), np.sin(time / 25), walk, noise], axis=1)


def power_average(sequences: np.ndarray, sigma_rel: float) -> np.ndarray:
    """The definition: step k weighs as the integral of t^gamma over [k - 1, k]."""
    edges = (np.arange(len(sequences) + 1) / len(sequences)) ** (gamma_of(sigma_rel) + 1)
    return np.diff(edges) @ sequences


class Toy(nn.Module):
    """Four scalars as a parameter and four as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("shift", torch.zeros(4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.002), (torch.float16, 0.005)])
def test_made_averages_equal_directly_computed_ones(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """400 known steps, 20 snapshots; errors as a share of how far each sequence spreads or lies from 0."""
    sequences, toy = toy_sequences(400), Toy()
    averages = PosthocAverages(toy, (0.05, 0.10))
    for step, values in enumerate(torch.tensor(sequences, dtype=torch.float32), start=1):
        toy.weight.data.copy_(values)
        toy.shift.copy_(-values)
        averages.update(toy, step)
        if step % 20 == 0:
            averages.write(tmp_path, step, dtype)
    scale = np.abs(sequences).max(axis=0)
    for sigma_rel, average in averages.tensors.items():
        error = np.abs(average["weight"].numpy() - power_average(sequences, sigma_rel)) / scale
        assert error.max() < 1e-5
    stored = list_snapshots(tmp_path)
    assert len(stored) == 40
    for sigma_rel in (0.05, 0.07, 0.12, 0.15, 0.20):
        coefficients, _ = combine(list(stored), Profile(400, sigma_rel))
        mixed = mix_snapshots(toy, dict(zip(stored.values(), coefficients.tolist())))
        expected = power_average(sequences, sigma_rel)
        assert (np.abs(mixed["weight"].numpy() - expected) / scale).max() < tolerance
        torch.testing.assert_close(mixed["shift"], -mixed["weight"])


def test_a_run_keeps_its_averages(finished: Path) -> None:
    stored = list_snapshots(finished / "run/posthoc_ema")
    assert list(stored) == [Profile(step, sigma_rel) for step in (2, 4, 5) for sigma_rel in (0.05, 0.10)]
    assert [path.name for path in (finished / "run/checkpoints/checkpoint-3/posthoc_ema").iterdir()]


def test_resuming_leaves_the_same_snapshots_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    """Killed after step 5, whose checkpoint was not whole yet: later snapshots are lost work and are made again."""
    resumed = tmp_path / "run"
    shutil.copytree(finished / "run", resumed)
    shutil.rmtree(resumed / "checkpoints/checkpoint-5")
    lost = [path for profile, path in list_snapshots(resumed / "posthoc_ema").items() if profile.step > 3]
    lost += [snapshot_path(resumed / "posthoc_ema", Profile(50, 0.05)), resumed / "posthoc_ema/.tmp-x.safetensors"]
    for path in lost:
        path.write_bytes(b"of another life")
    run(load_config(finished / "config.py", [*OPTIONS, "max_steps=5"]), resumed, resume_from="latest")
    whole = {path.name: path.read_bytes() for path in (finished / "run/posthoc_ema").iterdir()}
    assert len(whole) == 6
    assert {path.name: path.read_bytes() for path in (resumed / "posthoc_ema").iterdir()} == whole


def test_resuming_with_other_averages_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    config = load_config(finished / "config.py", [*OPTIONS, "posthoc_ema.sigma_rels=[0.05,0.2]"])
    with pytest.raises(CheckpointError, match=r"sigma_rels \[0.05, 0.1\], the config asks for \[0.05, 0.2\]"):
        run(config, tmp_path / "run", resume_from="latest")


def test_the_tool_writes_a_folder_that_diffusers_opens(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "average"
    done = run_program(["tools/posthoc_ema.py", str(finished / "run"), "--sigma_rel", "0.08", "--output", str(output)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{output}: average with sigma_rel 0.08 at step 5 from 6 stored averages; error of its" in done.stdout
    stock = PixArtTransformer2DModel.from_pretrained(output)
    assert stock.config.out_channels == 8
    stored = list_snapshots(finished / "run/posthoc_ema")
    coefficients, _ = combine(list(stored), Profile(5, 0.08))
    mixed = mix_snapshots(load_transformer(output), dict(zip(stored.values(), coefficients.tolist())))
    torch.testing.assert_close(stock.proj_out.weight, mixed["final_layer.linear.weight"], rtol=0, atol=0)
    assert stock.proj_out.weight.abs().max() > 0


def test_a_stored_average_comes_back_as_it_is(finished: Path, tmp_path: Path) -> None:
    made = reconstruct(finished / "run", 0.10, tmp_path / "average", step=4)
    assert (made.step, made.num_averages) == (4, 4)
    found = load_transformer(tmp_path / "average").state_dict()
    stored = mix_snapshots(
        load_transformer(tmp_path / "average"),
        {snapshot_path(finished / "run/posthoc_ema", Profile(4, 0.10)): 1.0},
    )
    for key in found.keys() - {"pos_embed", "y_embedder.y_embedding"}:
        torch.testing.assert_close(found[key], stored[key], rtol=1e-6, atol=1e-9)


def test_what_cannot_be_made_is_refused(finished: Path, tmp_path: Path) -> None:
    work_dir, output = finished / "run", tmp_path / "average"
    with pytest.raises(ConfigError, match="sigma_rel=0.3 must be between 0 and 0.288"):
        reconstruct(work_dir, 0.3, output)
    with pytest.raises(ConfigError, match="step=6 is outside .* choose 2 to 5"):
        reconstruct(work_dir, 0.1, output, step=6)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read .* give the folder of a training run"):
        reconstruct(tmp_path / "none", 0.1, output)
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        reconstruct(work_dir, 0.1, finished)
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(work_dir / "config.json", copy)
    with pytest.raises(CheckpointError, match=r"holds no snapshots in posthoc_ema/; train with posthoc_ema=dict\("):
        reconstruct(copy, 0.1, output)
    PosthocAverages(Toy(), (0.05,)).write(copy / "posthoc_ema", 1, torch.float16)
    with pytest.raises(CheckpointError, match=r"sigma_rel-0.05.safetensors does not fit the model; missing: .*; unexp"):
        reconstruct(copy, 0.1, output)
    (copy / "posthoc_ema/step-0000001_sigma_rel-0.05.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"sigma_rel-0.05.safetensors cannot be read"):
        reconstruct(copy, 0.1, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_lost_steps_lose_their_snapshots(tmp_path: Path) -> None:
    averages = PosthocAverages(Toy(), (0.05, 0.10))
    for step in (5, 10, 10_000_000):
        averages.write(tmp_path, step, torch.float32)
    drop_snapshots_after(tmp_path, 9)
    assert list(list_snapshots(tmp_path)) == [Profile(5, 0.05), Profile(5, 0.10)]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match="make room"):
        PosthocAverages(Toy(), (0.05,)).write(tmp_path, 1, torch.float16)
    assert list(tmp_path.iterdir()) == []
