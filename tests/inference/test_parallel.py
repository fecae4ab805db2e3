"""A picture drawn by several processes is the picture of one. Real gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion.inference.recipe import read_recipe
from tests.inference.tiny_pipeline import load_quietly, write_tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(processes: int, *program: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *map(str, program)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("pipe"))


@pytest.mark.slow
def test_four_processes_draw_what_one_draws(folder: Path, tmp_path: Path) -> None:
    """Guidance halves apart and tokens shared out, tokens alone, ControlNet, compressed keys, errors."""
    done = launch(4, "-m", "tests.inference.parallel_worker", folder, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    from tests.inference.parallel_worker import CASES, draw

    for name, case in CASES.items():
        expected = draw(load_quietly(folder, **case.load()), case)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(4)]
        assert all(torch.equal(ranks[0], other) for other in ranks[1:]), name
        torch.testing.assert_close(ranks[0], expected, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")  # noqa: B023
    errors = (tmp_path / "errors-3.txt").read_text()
    assert "a batch of 1 without guidance does not divide by 2 groups" in errors
    assert (
        "latents of 12 rows do not divide by 8 (4 processes share them); draw a height that is a multiple of 64 px"
        in errors
    )


@pytest.mark.slow
def test_the_program_under_torchrun_writes_each_picture_once(folder: Path, tmp_path: Path) -> None:
    command = ["scripts/inference.py", "--model_path", folder, "--pipeline_load_from", folder, "--device", "cpu"]
    command += ["--prompt", "a red apple", "--num_images", 2, "--step", 2, "--grid", "--output"]
    shared = launch(2, *command, tmp_path / "two")
    assert shared.returncode == 0, shared.stderr[-3000:]
    assert shared.stdout.count("2 pictures in") == 1
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == ["000-a-red-apple.png", "001-a-red-apple.png", "grid.png"]
    assert read_recipe(tmp_path / "two" / names[0])["prompt"] == "a red apple"
    again = launch(2, *command, tmp_path / "two")
    assert again.returncode == 0 and "2 of 2 pictures are already in" in again.stderr
