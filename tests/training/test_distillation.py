"""LCM and LCM-LoRA on tiny real parts: what trains, what a checkpoint holds, exact resume, wrong teachers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, PixArtTransformer2DModel
from peft import PeftModel

from diffusion.checkpoints import load_transformer, open_checkpoint, save_transformer
from diffusion.config import TrainConfig, load_config
from diffusion.errors import CheckpointError, ConfigError
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.models import PixArt
from diffusion.training import Reporting, Trainer
from diffusion.training.distillation import LCM, LCMLoRA
from diffusion.training.family import Family
from tests.programs import run_program
from tests.training.tiny_run import curve, weights

FAMILIES = [LCM, LCMLoRA]
SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def teacher(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    network = PixArt(**SIZES, caption_channels=32, input_size=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    folder = tmp_path_factory.mktemp("teacher")
    save_transformer(network, folder / "transformer")
    return folder


def configured(config_file: Path, teacher: Path, *options: str) -> TrainConfig:
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    common = [*sizes, f"load_from={teacher}", "class_dropout_prob=0.0", "ema_decay=0.5", "lora_rank=4", "cfg_scale=3.5"]
    return load_config(config_file, [*common, *options])


def run(config: TrainConfig, family: Family, work_dir: Path, **options: object) -> Trainer:
    torch.set_num_threads(1)
    trainer = Trainer(
        config, family.objective, work_dir, reporting=Reporting(tensorboard=False), family=family, **options
    )  # type: ignore[arg-type]
    trainer.fit()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_is_bit_exact(family: type[Family], config_file: Path, teacher: Path, tmp_path: Path) -> None:
    whole = run(configured(config_file, teacher), family(), tmp_path / "whole")
    run(configured(config_file, teacher, "max_steps=3"), family(), tmp_path / "cut")
    resumed = run(configured(config_file, teacher), family(), tmp_path / "cut", resume_from="latest")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    first, second = whole.state.network.state_dict(), resumed.state.network.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if family is LCM:
        averaged = [weights(tmp_path / name, 6, "transformer_ema") for name in ("whole", "cut")]
        assert all(torch.equal(averaged[0][key], averaged[1][key]) for key in averaged[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_it_learns_the_same(family: type[Family], config_file: Path, teacher: Path, tmp_path: Path) -> None:
    options = ["max_steps=3", "validation.num_samples=0"]
    run(configured(config_file, teacher, *options), family(), tmp_path / "plain")
    compiled = run(configured(config_file, teacher, "compile=True", *options), family(), tmp_path / "compiled")
    assert len(curve(tmp_path / "plain")) == 3
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), rel=1e-4)
    if family is LCM:  # three of its four passes are in networks without gradients
        roles = compiled.objective.roles  # type: ignore[union-attr]
        blocks = [*roles.teacher.blocks, *roles.target.blocks]
        assert all(block._compiled_call_impl is not None for block in blocks)


def test_another_familys_program_does_not_resume_it(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    config = configured(config_file, teacher, "max_steps=1")
    run(config, LCM(), tmp_path / "run")
    for family, name in ((Family(), "base training"), (LCMLoRA(), "LCMLoRA")):
        shutil.copytree(tmp_path / "run", tmp_path / name)  # this process still holds the lock of the run
        with pytest.raises(
            ConfigError, match=f"checkpoint-1 is of LCM, and this program trains {name}; resume it with"
        ):
            run(config, family, tmp_path / name, resume_from="latest", allow_config_change=True)


def test_the_target_is_the_average_of_the_student(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    trainer = run(configured(config_file, teacher, "max_steps=1"), LCM(), tmp_path / "run")
    roles = trainer.objective.roles  # type: ignore[union-attr]
    student, target, start = (
        module.t_block[1].bias.cpu() for module in (trainer.state.network, roles.target, roles.teacher)
    )
    torch.testing.assert_close(target, 0.5 * start + 0.5 * student)
    assert torch.equal(start, load_transformer(teacher).t_block[1].bias)
    assert not torch.equal(student, start)
    saved = weights(tmp_path / "run", 1, "transformer_ema")["adaln_single.linear.bias"]
    assert torch.equal(saved, target)


def test_an_lcm_is_recognised_and_draws(config_file: Path, teacher: Path, parts: Path, tmp_path: Path) -> None:
    run(configured(config_file, teacher, "max_steps=1"), LCM(), tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/checkpoint-1"
    assert open_checkpoint(checkpoint).found.lcm
    assert not open_checkpoint(teacher).found.lcm
    LCMScheduler.from_pretrained(str(checkpoint / "scheduler"))
    pipeline = PixArtPipeline.from_pretrained(parts / "pipe", transformer=checkpoint, ema=True, algorithm="lcm")
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 2, 4, 8):
        drawn = pipeline("a cat", num_inference_steps=steps, guidance_scale=1.0, seed=0, output_type="latent").images
        assert torch.isfinite(drawn).all()
    with pytest.raises(CheckpointError, match="is distilled already; give the model that it was distilled from"):
        Trainer(configured(config_file, checkpoint), LCM().objective, tmp_path / "again", family=LCM())


def test_a_lora_checkpoint_opens_with_peft(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    trainer = run(configured(config_file, teacher, "max_steps=2", "save_model_steps=1"), LCMLoRA(), tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    assert not (checkpoint / "transformer").exists()
    stock = PixArtTransformer2DModel.from_pretrained(teacher / "transformer")
    opened = PeftModel.from_pretrained(stock, checkpoint).eval()
    x, caption = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 32)
    with torch.no_grad():
        ours = trainer.state.network.cpu().eval()(x, torch.tensor([300.0]), caption)
        size = {"resolution": None, "aspect_ratio": None}
        theirs = opened(x, caption, torch.tensor([300.0]), added_cond_kwargs=size, return_dict=False)[0]
        base = load_transformer(teacher)(x, torch.tensor([300.0]), caption)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_learns_and_validates(
    family: type[Family], config_file: Path, teacher: Path, tmp_path: Path
) -> None:
    options = ["max_steps=30", "validation.every_steps=30", "validation.at_start=True", "train_batch_size=8"]
    options += ["validation.prompts=['red apple']", "validation.num_inference_steps=2", "validation.guidance_scale=1.0"]
    run(configured(config_file, teacher, *options), family(), tmp_path / "run")
    validation = curve(tmp_path / "run", "validation_loss")
    assert validation[30] < validation[0]
    assert (tmp_path / "run/validation/step_0000030.png").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_teachers_are_explained(family: type[Family], config_file: Path, teacher: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, *options: str, **arguments: object) -> None:
        shutil.rmtree(tmp_path / "none", ignore_errors=True)
        work_dir = arguments.pop("work_dir", tmp_path / "none")
        config = configured(config_file, teacher, *options)
        with pytest.raises(error, match=match):
            Trainer(config, family().objective, work_dir, family=family(), **arguments)  # type: ignore[arg-type]

    refused(ConfigError, "the teacher is missing; give its weights with --load-from", "load_from=None")
    refused(CheckpointError, "other shape", "hidden_size=48")
    refused(ConfigError, "num_ddim_timesteps=30 must divide", "num_ddim_timesteps=30")
    refused(ConfigError, "posthoc_ema is not offered", "posthoc_ema.snapshot_every_steps=2")
    run(configured(config_file, teacher, "max_steps=1"), family(), tmp_path / "run")
    other = load_transformer(teacher)
    other.t_block[1].bias.data += 1
    save_transformer(other, tmp_path / "other/transformer")
    options = [f"load_from={tmp_path / 'other'}"]
    arguments = {"work_dir": tmp_path / "run", "resume_from": "latest"}
    refused(ConfigError, "was trained with another fingerprint of teacher", *options, **arguments)


def test_solver_lcm_is_the_grid_of_the_distillation() -> None:
    scheduler = make_scheduler("lcm")
    for steps, expected in ((1, [999]), (2, [999, 499]), (4, [999, 759, 519, 279])):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == expected


PROGRAMS = ["train_pixart_lcm_lora.py", "train_pixart_dmd.py"]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_two_processes_equal_one(program: str, config_file: Path, teacher: Path, tmp_path: Path) -> None:
    config = configured(config_file, teacher)
    (tmp_path / "config.json").write_text(config.to_json())
    for name, launcher, batch in (
        ("one", [], 4),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 2),
    ):
        command = [*launcher, f"train_scripts/{program}", str(tmp_path / "config.json"), "--report_to", "none"]
        options = ["max_steps=3", f"train_batch_size={batch}"]
        done = run_program([*command, "--work-dir", str(tmp_path / name), "--cfg-options", *options])
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert set(one) == {1, 2, 3}
    assert two == pytest.approx(one, rel=1e-4)
    assert curve(tmp_path / "two", "grad_norm") == pytest.approx(curve(tmp_path / "one", "grad_norm"), rel=1e-3)
