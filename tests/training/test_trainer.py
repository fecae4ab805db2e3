"""The training loop on tiny real parts: features of real pictures, real processes, real files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from diffusion.config import load_config
from diffusion.errors import CheckpointError, ConfigError, DataError, WorkDirLockedError
from diffusion.files import FolderLock
from diffusion.models import PixArt
from diffusion.training import Reporting, Trainer, denoising_objective
from diffusion.training.optimization import WeightAverage, lr_factor, parameter_groups, scaled_learning_rate
from tests.programs import below_file_size, run_program
from tests.training.tiny_run import curve, run, weights


def test_resume_is_bit_exact(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file), tmp_path / "whole")
    run(load_config(config_file, ["max_steps=3"]), tmp_path / "cut")
    resumed = run(load_config(config_file), tmp_path / "cut", resume_from="latest")
    assert resumed.state.step == 6
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    for name in ("transformer", "transformer_ema"):
        whole, cut = weights(tmp_path / "whole", 6, name), weights(tmp_path / "cut", 6, name)
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_what_a_resumed_run_does_not_read_is_said(config_file: Path, parts: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["max_steps=2"]), tmp_path / "run")
    other = f"load_from={str(parts / 'pipe')!r}"
    trainer = run(load_config(config_file, ["max_steps=3", other]), tmp_path / "run", resume_from="latest")
    log = tmp_path / "run/train_log.log"
    assert "pipe is not read: the run goes on from its checkpoint; it began from None" in log.read_text()
    assert trainer.config.load_from is None
    assert json.loads((tmp_path / "run/config.json").read_text())["load_from"] is None
    run(load_config(config_file, ["max_steps=1"]), tmp_path / "run", resume_from="latest")
    assert "the run is at step 3 and ends at 1: no step is left" in log.read_text()


def test_parts_of_a_checkpoint_can_be_left_behind(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["max_steps=4", "save_model_steps=2"]), tmp_path / "run")

    def resumed(*options: str) -> Trainer:
        wanted = ["resume_from.checkpoint=latest", *options]
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        config = load_config(config_file, ["max_steps=6", *wanted])
        trainer = Trainer(config, denoising_objective, tmp_path / "copy", reporting=Reporting(tensorboard=False))
        return trainer

    averaged = weights(tmp_path / "run", 4, "transformer_ema")
    for load_ema, same in ((True, True), (False, False)):
        trainer = resumed(f"resume_from.load_ema={load_ema}")
        bias = trainer.state.network.t_block[1].bias.cpu()  # type: ignore[union-attr]
        assert torch.equal(bias, averaged["adaln_single.linear.bias"]) == same
        trainer.lock.release()
    for keep in (True, False):
        trainer = resumed(f"resume_from.resume_optimizer={keep}")
        moments = [state["step"].item() for state in trainer.state.optimizer.state.values()]
        assert set(moments) == ({4.0} if keep else set())
        trainer.lock.release()
    for keep, expected in ((True, 1e-3), (False, 0.5e-3)):  # a warm-up of two steps begins anew
        trainer = resumed(f"resume_from.resume_lr_scheduler={keep}", "max_steps=5")
        trainer.fit()
        assert curve(tmp_path / "copy", "lr")[5] == pytest.approx(expected)


def test_lost_steps_leave_no_metrics(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["max_steps=5", "save_model_steps=3"]), tmp_path / "run")
    (tmp_path / "run/checkpoints/checkpoint-5").rename(tmp_path / "gone")
    run(load_config(config_file), tmp_path / "run", resume_from="latest")
    rows = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [step for step in rows if step <= 6] == sorted(rows)
    assert set(curve(tmp_path / "run")) == {1, 2, 3, 4, 5, 6}


def test_a_run_lost_before_its_first_checkpoint_begins_anew(config_file: Path, tmp_path: Path) -> None:
    options = ["max_steps=2", "validation.at_start=True", "save_model_steps=None"]
    run(load_config(config_file, options), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    run(load_config(config_file, options), tmp_path / "run", resume_from="latest")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]


def test_accumulation_equals_a_large_batch(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["max_steps=4"]), tmp_path / "large")
    options = ["max_steps=4", "train_batch_size=1", "gradient_accumulation_steps=4"]
    run(load_config(config_file, options), tmp_path / "small")
    for step, loss in curve(tmp_path / "large").items():
        assert curve(tmp_path / "small")[step] == pytest.approx(loss, rel=1e-5)


LAUNCHERS = {  # each finds a free port by itself
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "torch.distributed.launch": ["torch.distributed.launch", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}


def train_program(config: Path, work_dir: Path, *options: str) -> list[str]:
    """The command of a run. It shows no first batch: importing the VAE takes longer than the steps do."""
    program = ["train_scripts/train.py", str(config), "--work-dir", str(work_dir), "--report_to", "none"]
    return [*program, "--cfg-options", "pipeline_load_from=None", *options]


@pytest.mark.parametrize("launcher", ["torchrun", *(pytest.param(n, marks=pytest.mark.slow) for n in [*LAUNCHERS][1:])])
def test_two_processes_equal_one(launcher: str, config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["max_steps=4"]), tmp_path / "one")
    command = ["-m", *LAUNCHERS[launcher]]
    options = ["train_batch_size=2", "max_steps=4", "posthoc_ema.snapshot_every_steps=2"]
    done = run_program([*command, *train_program(config_file, tmp_path / "two", *options)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 x cpu" in done.stdout
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert set(one) == set(two) == {1, 2, 3, 4}
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-5)
    norms = curve(tmp_path / "one", "grad_norm"), curve(tmp_path / "two", "grad_norm")
    assert norms[1][4] == pytest.approx(norms[0][4], rel=1e-4)
    assert len([*(tmp_path / "two/posthoc_ema").iterdir()]) == 4


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_74_and_keeps_what_was_saved(config_file: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 100 kB, as on a full disk; a checkpoint of this model has larger ones."""
    assert run_program(train_program(config_file, tmp_path / "run", "max_steps=3")).returncode == 0

    command = train_program(config_file, tmp_path / "run", "max_steps=12", "save_model_steps=2")
    done = run_program(below_file_size(100_000, [*command, "resume_from.checkpoint=latest"]))
    assert done.returncode == 74, done.stderr[-2000:]
    assert "error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout.count("was not saved") == 3
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-3"]


def test_training_learns_and_validates(config_file: Path, tmp_path: Path) -> None:
    options = ["max_steps=40", "validation.every_steps=40", "validation.at_start=True", "validation.num_samples=3"]
    options += ["validation.prompts=['red apple','a cat']", "validation.num_inference_steps=2", "train_batch_size=8"]
    trainer = run(load_config(config_file, options), tmp_path / "run")
    losses = curve(tmp_path / "run")
    assert sum(losses[s] for s in range(36, 41)) < 0.9 * sum(losses[s] for s in range(1, 6))
    validation = curve(tmp_path / "run", "validation_loss")
    assert validation[40] < validation[0]
    assert sorted(path.name for path in (tmp_path / "run/validation").glob("*.png")) == [
        "step_0000000.png",
        "step_0000040.png",
    ]
    assert trainer.state.network.training


def test_the_grid_is_drawn_with_a_stored_null_caption(config_file: Path, tmp_path: Path) -> None:
    options = ["null_caption=stored", "max_steps=1", "validation.num_samples=0", "validation.prompts=['a cat']"]
    run(load_config(config_file, [*options, "validation.num_inference_steps=2"]), tmp_path)
    assert (tmp_path / "validation" / "step_0000001.png").is_file()
    assert (tmp_path / "checkpoints" / "checkpoint-1").is_dir()


def test_a_grid_that_cannot_be_written_does_not_cost_the_steps(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "validation").write_text("where the folder of grids should be")
    options = ["max_steps=2", "validation.every_steps=1", "validation.prompts=['a cat']", "save_model_steps=2"]
    with pytest.raises(FileExistsError, match="validation"):
        run(load_config(config_file, [*options, "validation.num_inference_steps=2"]), tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-1").is_dir()
    (tmp_path / "validation").unlink()
    run(load_config(config_file, [*options, "validation.num_inference_steps=2", "resume_from=latest"]), tmp_path)
    assert (tmp_path / "validation" / "step_0000002.png").is_file()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_float32(precision: str, config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["max_steps=3"]), tmp_path / "full")
    run(load_config(config_file, ["max_steps=3", f"mixed_precision='{precision}'"]), tmp_path / "low")
    full, low = curve(tmp_path / "full"), curve(tmp_path / "low")
    assert all(low[step] == pytest.approx(full[step], rel=0.02) for step in full)


def test_a_folder_with_a_run_is_refused(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["max_steps=1"])
    run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        Trainer(config, denoising_objective, tmp_path / "run")


def test_a_held_folder_is_refused(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(WorkDirLockedError, match=str(os.getpid())) as error:
        Trainer(load_config(config_file), denoising_objective, tmp_path / "run")
    assert error.value.exit_code == 76
    lock.release()
    run(load_config(config_file, ["max_steps=1"]), tmp_path / "run")


def test_wrong_starting_points(config_file: Path, tmp_path: Path, parts: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(CheckpointError, match="blocks.1.attn.qkv.weight"):
        Trainer(config, denoising_objective, tmp_path / "a", load_from=str(parts / "pipe"))
    with pytest.raises(DataError, match="caption_channels"):
        Trainer(load_config(config_file, ["caption_channels=64"]), denoising_objective, tmp_path / "b")
    run(load_config(config_file, ["max_steps=1"]), tmp_path / "d")
    with pytest.raises(ConfigError, match="keep the product"):
        Trainer(
            load_config(config_file, ["train_batch_size=2"]), denoising_objective, tmp_path / "d", resume_from="latest"
        )


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_program(["train_scripts/train.py", str(tmp_path / "none.py")])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "none.py: no such config file" in done.stderr


def test_learning_rate_rules(config_file: Path) -> None:
    config = load_config(config_file, ["auto_lr={'rule':'sqrt'}"])
    assert scaled_learning_rate(config, 1024) == pytest.approx(2e-3)
    linear = load_config(config_file, ["auto_lr={'rule':'linear'}"])
    assert scaled_learning_rate(linear, 1024) == pytest.approx(4e-3)
    cosine = load_config(config_file, ["lr_schedule='cosine'", "lr_schedule_args.num_warmup_steps=10"])
    factor = lr_factor(cosine, 110)
    assert [factor(0), factor(9), factor(60), factor(110)] == pytest.approx([0.1, 1.0, 0.5, 0.0])


def test_only_matrices_decay() -> None:
    model = PixArt(hidden_size=32, num_heads=2, depth=1, caption_channels=8)
    decayed, rest = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])  # type: ignore[attr-defined]
    assert any("scale_shift_table" in names[id(p)] for p in rest["params"])  # type: ignore[attr-defined]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_average_follows_its_formula_and_includes_buffers() -> None:
    model = torch.nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    expected = model.state_dict()["weight"].clone()
    for n in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(float(n))
            model.running_mean.fill_(float(n))
            model.num_batches_tracked.fill_(n)
        average.update(model)
        rate = min(0.5, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate) * n
    torch.testing.assert_close(average.tensors["weight"], expected)
    assert average.tensors["running_mean"].abs().min() > 0
    assert average.tensors["num_batches_tracked"] == 3
