"""Many processes equal one, in every mode; what is wrong on one of them is seen by all. Real gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion.config import load_config
from diffusion.data import AspectRatioBatchSampler
from diffusion.training import replay_step
from tests.training.parallel_worker import SGD, SMALL
from tests.training.tiny_run import ROOT, curve, run, weights, write_config


def run_workers(count: int, config_file: Path, root: Path, *scenarios: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *launcher, "tests/training/parallel_worker.py", str(config_file), str(root), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def config_file(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "config.py", parts)


@pytest.fixture(scope="module")
def two(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes left, and what they said."""
    root = tmp_path_factory.mktemp("two")
    return root, run_workers(2, config_file, root, "modes", "nan", "unequal", "slow")


@pytest.fixture(scope="module")
def one(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    root = tmp_path_factory.mktemp("one") / "run"
    options = ["gradient_clip=0.01", "posthoc_ema.snapshot_every_steps=3"]
    run(load_config(config_file, [*SMALL, *options]), root)
    return root


def assert_same_state(work_dir: Path, reference: Path, step: int) -> None:
    """Weights, EMA and optimiser of a checkpoint, equal within the reordering of float32 sums."""
    for name in ("transformer", "transformer_ema"):
        ours, theirs = weights(work_dir, step, name), weights(reference, step, name)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-6, msg=f"{name} {key}")
    ours, theirs = optimizer_state(work_dir, step), optimizer_state(reference, step)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-7, msg=key)


def optimizer_state(work_dir: Path, step: int) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader, load

    folder = work_dir / f"checkpoints/checkpoint-{step}/training_state"
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size) for key, entry in metadata.items() if hasattr(entry, "size")}
    load(state, checkpoint_id=folder, no_dist=True)
    return state


def assert_same_run(work_dir: Path, reference: Path, steps: int = 6) -> None:
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = {step: value for step, value in curve(reference, key).items() if step <= steps}
        assert curve(work_dir, key) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("mode", ["ddp", "copies", "full", "grad_op"])
def test_two_processes_of_every_mode_equal_one(mode: str, one: Path, two: tuple[Path, str]) -> None:
    """Clipped; copies (ddp with shared memory) and full_shard also accumulate, full_shard recomputes selectively,
    shard_grad_op recomputes blocks."""
    work_dir = two[0] / mode
    assert_same_run(work_dir, one)
    assert curve(work_dir, "validation_loss") == pytest.approx(curve(one, "validation_loss"), rel=1e-5)
    assert_same_state(work_dir, one, 6)
    names = {path.name for path in (one / "checkpoints/checkpoint-6").iterdir()}
    assert {path.name for path in (work_dir / "checkpoints/checkpoint-6").iterdir()} - {"posthoc_ema"} <= names
    if mode in ("full", "grad_op"):  # snapshots of shards, gathered
        from safetensors.torch import load_file

        for path in (one / "posthoc_ema").iterdir():
            ours, theirs = load_file(work_dir / "posthoc_ema" / path.name), load_file(path)
            assert all(torch.allclose(ours[key].float(), theirs[key].float(), atol=1e-3) for key in theirs)


def test_a_run_moves_from_ddp_to_shards_to_one_process(config_file: Path, one: Path, two: tuple[Path, str]) -> None:
    moved = two[0] / "moved"
    run(load_config(config_file, [*SMALL, "gradient_clip=0.01"]), moved, resume_from="latest")
    assert_same_run(moved, one)
    assert_same_state(moved, one, 6)
    worlds = [json.loads(path.read_text())["world_size"] for path in sorted(moved.glob("checkpoints/*/trainer.json"))]
    assert worlds == [2, 2, 1, 1][: len(worlds)]


def test_shards_in_bf16_stay_near_ddp_in_bf16(two: tuple[Path, str]) -> None:
    """Blocks are gathered and gradients summed in bf16; tables and biases are rounded that DDP keeps in float32."""
    assert curve(two[0] / "bf16-full") == pytest.approx(curve(two[0] / "bf16-ddp"), rel=2e-3)


@pytest.mark.slow
def test_shards_of_compiled_blocks(config_file: Path, tmp_path: Path) -> None:
    run_workers(2, config_file, tmp_path, "compiled")
    run(load_config(config_file, [*SMALL, "max_steps=3"]), tmp_path / "plain")
    assert_same_run(tmp_path / "compiled", tmp_path / "plain", 3)


@pytest.mark.slow
def test_hybrid_shards_on_four_processes(config_file: Path, one: Path, tmp_path: Path) -> None:
    """And gradients averaged by copies, as on two hosts."""
    run_workers(4, config_file, tmp_path, "modes")
    for mode in ("hybrid", "copies"):
        assert_same_run(tmp_path / mode, one)
        assert_same_state(tmp_path / mode, one, 6)


class SamplerWithoutStep3(AspectRatioBatchSampler):
    """The same order, draws and numbers, less the third batch."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        for keys in super().__iter__():
            if not 8 <= keys[0].number < 12:
                yield keys


def run_without_step_3(config_file: Path, work_dir: Path, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.training.trainer.AspectRatioBatchSampler", SamplerWithoutStep3)
        run(load_config(config_file, [*SMALL, "max_steps=5", "save_model_steps=5", *options]), work_dir)


@pytest.mark.parametrize(("name", "options"), [("loss", []), ("gradient", []), ("sharded", []), ("sgd", SGD)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(
    name: str, options: list[str], config_file: Path, tmp_path: Path, two: tuple[Path, str]
) -> None:
    """As if the batch had not been there: weights, EMA, moments and learning rate (which warms up) are untouched."""
    work_dir = two[0] / name
    run_without_step_3(config_file, tmp_path / "without", *options)
    losses, expected = curve(work_dir), curve(tmp_path / "without")
    assert sorted(losses) == [1, 2, 4, 5, 6]
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert curve(work_dir, "skipped_steps") == {3: 1, 4: 1, 5: 1, 6: 1}
    for kind in ("transformer", "transformer_ema"):
        ours, theirs = weights(work_dir, 6, kind), weights(tmp_path / "without", 5, kind)
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=2e-6) for key in theirs)
    trainer = json.loads((work_dir / "checkpoints/checkpoint-6/trainer.json").read_text())
    assert (trainer["step"], trainer["skipped_steps"], trainer["ema_updates"]) == (6, 1, 5)


def test_a_skipped_step_says_which_rank_and_replays(
    two: tuple[Path, str], config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "step 3 skipped on all processes, not finite: loss of rank 1 and gradient of rank 0, 1" in two[1]
    assert "step 3 skipped on all processes, not finite: gradient of rank 1; see" in two[1]
    run(load_config(config_file, [*SMALL, "max_steps=3"]), tmp_path / "sound")
    path = two[0] / "loss/replay/step-0000003/replay.json"
    assert [part["rank"] for part in json.loads(path.read_text())["parts"]] == [0, 1, 0, 1]
    replay_step(path)
    said = capsys.readouterr().out
    loss = float(said.split("together: loss ")[1].split(",")[0])
    assert loss == pytest.approx(curve(tmp_path / "sound")[3], rel=1e-5)
    assert "the step is finite here" in said


def test_too_many_skipped_steps_end_the_run_with_77(two: tuple[Path, str]) -> None:
    for rank in (0, 1):
        text = (two[0] / f"stopped/error-{rank}.txt").read_text()
        assert text.startswith("77 3 steps in a row had a loss or gradient that is not finite (last: step 3)")


def test_weights_that_differ_between_ranks_are_named(two: tuple[Path, str]) -> None:
    for rank in (0, 1):
        text = (two[0] / f"unequal/error-{rank}.txt").read_text()
        assert text.startswith("77 final_layer.linear.bias of rank 1 is not that of rank 0 after step 1")


def test_a_straggler_is_named_once(two: tuple[Path, str]) -> None:
    lines = [line for line in two[1].splitlines() if "is slow" in line]
    assert len(lines) == 1
    assert "rank 1 is slow" in lines[0]
