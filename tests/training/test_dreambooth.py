"""train_dreambooth.py and train_diffusers.py as programs' functions on a tiny pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusion.adapters import read_adapter
from diffusion.config import TrainConfig, load_config
from diffusion.errors import ConfigError
from diffusion.features import FeatureStore
from diffusion.training.dreambooth import check_prompts
from tests.doors import Done, Door
from tests.training.tiny_run import ROOT


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    for path in sorted((ROOT / "data/emoji/images").iterdir())[:3]:
        shutil.copy(path, folder)
    (folder / "note.txt").write_text("texts beside the pictures are not read")
    return folder


@pytest.fixture
def config_file(parts: Path, subject: Path, tmp_path: Path) -> Path:
    path = tmp_path / "dreambooth.py"
    path.write_text(
        f"data_root = '/'\ndata = dict(type='DreamBooth', root={str(subject)!r}, prompt=['a photo of sks dog'])\n"
        "image_size = 32\nmodel = 'PixArt_Ti_2'\nhidden_size = 32\nnum_heads = 2\ndepth = 1\ncaption_channels = 32\n"
        f"null_caption = 't5_empty'\npipeline_load_from = {str(parts / 'pipe')!r}\nload_from = pipeline_load_from\n"
        "train_batch_size = 2\nnum_workers = 0\nmax_steps = 3\nlog_interval = 1\nsave_model_epochs = None\n"
        "mixed_precision = 'no'\nauto_lr = None\nema_rate = None\noptimizer = dict(lr=1e-3, eps=1e-8)\n"
        "lr_schedule_args = dict(num_warmup_steps=0)\n"
        "validation = dict(prompts=['a photo of sks dog'], num_samples=0, num_inference_steps=2)\n"
    )
    return path


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    torch.set_num_threads(1)
    return Door(monkeypatch, capsys)


def ran(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    return done


def test_with_prior_preservation(door: Door, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--class_prompt", "a photo of a dog", "--num_class_images", "4", "--prior_weight", "2", "--token", "sks"]
    flags += ["--cfg-options", "validation.prompts=[]", "validation.every_steps=3"]
    ran(door("train_scripts/train_dreambooth.py", config_file, "--work-dir", out, "--report_to", "none", *flags))
    assert len(list((out / "class_pictures").glob("*.png"))) == 4
    config = TrainConfig.from_json((out / "config.json").read_text())
    assert list(config.data.mix.values()) == [1.0, 2 * 3 / 4]  # twice as many of the class as of the subject
    texts = {FeatureStore(root).caption_text(0, 0) for root in config.data.mix}
    assert texts == {"a photo of sks dog", "a photo of a dog"}
    card = (out / "README.md").read_text()
    assert 'instance_prompt: "a photo of sks dog"' in card
    assert "- dreambooth" in card
    assert "| class prompt | a photo of a dog (weight 2) |" in card
    assert "Prompts `a photo of sks dog`, `a photo of a dog`; 2 steps" in card  # it draws what it learns
    assert (out / "validation/step_0000003.png").is_file()
    assert (out / "checkpoints/checkpoint-3/transformer/config.json").is_file()


def test_without_it_as_an_adapter_and_resumed(door: Door, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train_scripts/train_dreambooth.py", config_file, "--work-dir", out, "--report_to", "none", "--rank", 2]
    ran(door(*command, "--save_step", 1, "--lr", 0.01, "--cfg-options", "max_steps=1"))
    ran(door(*command, "--lr", 0.01, "--resume-from", "latest"))
    assert read_adapter(out).has_effect
    assert not (out / "class_pictures").exists()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.token='xyz'"], r"data\.prompt='a photo of sks dog' does not contain the token 'xyz'"),
        (["data.class_prompt='a photo of sks dog'"], r"has no word that data\.class_prompt=.* lacks; put a rare word"),
        (["data.token='dog'", "data.class_prompt='a dog'"], r"has no word that data\.class_prompt='a dog' lacks"),
        (["data.token='sks cat'"], r"does not contain the token 'sks cat'"),
        (["data.token='***'"], r"does not contain the token '\*\*\*'"),
        (["data.prompt=['a', 'b']"], r"must hold one prompt"),
        (["load_from=None"], r"give its weights with --load-from"),
        (["data.prior_weight=0"], r"data\.prior_weight=0 must be greater than 0"),
        (["data.prompt=['']"], r"data\.prompt is empty; give words$"),
        (["data.class_prompt=' '"], r"data\.class_prompt is empty; give words, or leave it out"),
    ],
)
def test_prompts_that_cannot_work(options: list[str], message: str, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_prompts(load_config(config_file, options, notify=lambda line: None))


@pytest.mark.parametrize("token", ["sks", "SKS", "<sks>", "sks dog"])
def test_tokens_that_the_prompt_holds(token: str, config_file: Path) -> None:
    options = [f"data.token={token!r}", "data.class_prompt='a photo of a dog'"]
    check_prompts(load_config(config_file, options, notify=lambda line: None))


def test_a_prompt_that_nothing_can_check_is_said(door: Door, config_file: Path, tmp_path: Path) -> None:
    command = ["train_scripts/train_dreambooth.py", config_file, "--load-from", tmp_path / "gone", "--prompt", "a dog"]
    unchecked = "nobody checks that 'a dog' has a word of its own"
    first = door(*command, "--work-dir", tmp_path / "a")
    assert first.returncode == 2 and unchecked in first.stderr + first.stdout
    second = door(*command, "--work-dir", tmp_path / "b", "--token", "dog")
    assert unchecked not in second.stderr + second.stdout
    assert "gone holds no transformer: no such file or folder" in second.stderr
    assert not (tmp_path / "b/features").exists()  # said before pictures are encoded


def test_flags_win_over_cfg_options(door: Door, config_file: Path, tmp_path: Path) -> None:
    command = ["train_scripts/train_dreambooth.py", config_file, "--work-dir", tmp_path / "run"]
    done = door(*command, "--rank", 0, "--cfg-options", "lora.rank=4")
    assert "error: --rank: lora.rank=0 must be" in done.stderr


def test_no_pictures(door: Door, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = ["train_scripts/train_dreambooth.py", config_file, "--work-dir", tmp_path / "run"]
    done = door(*command, "--train_class", tmp_path / "empty")
    assert done.returncode == 2
    assert "empty: no pictures; put a few of the subject there" in done.stderr
    assert "no such folder" in door(*command, "--train_class", tmp_path / "absent").stderr


def test_a_broken_picture_of_the_subject_stops_the_run(door: Door, config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "subject"
    folder.mkdir()
    shutil.copy(sorted((ROOT / "data/emoji/images").iterdir())[0], folder)
    (folder / "b.png").write_text("no picture")
    command = ["train_scripts/train_dreambooth.py", config_file, "--work-dir", tmp_path / "run"]
    done = door(*command, "--train_class", folder)
    assert done.returncode == 2
    assert "1 of 2 pictures cannot be used: " in done.stderr and "b.png" in done.stderr
    assert "--max-rejected" not in done.stderr
    assert "error: --rank: lora.rank=0 must be" in door(*command, "--rank", 0).stderr
    done = door(*command, "--num_class_images", 5)
    assert "--num_class_images is given without --class_prompt" in done.stderr


def test_the_published_configs_load() -> None:
    folder = ROOT / "configs/pixart_app_config"
    for name in ("PixArt_xl2_img1024_dreambooth.py", "PixArt_xl2_img1024_dreambooth_lora.py"):
        config = load_config(folder / name, ["load_from='weights.pth'"], notify=lambda line: None)
        check_prompts(config)
    assert config.lora is not None and config.lora.rank == 16


def test_train_diffusers_takes_the_network_of_the_pipeline(door: Door, parts: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        f"data_root = '/'\ndata = dict(type='Store', root={str(parts / 'store')!r}, split='train')\nimage_size = 32\n"
        "train_batch_size = 2\nnum_workers = 0\nmax_steps = 2\nlog_interval = 1\nsave_model_epochs = None\n"
        "mixed_precision = 'no'\nema_rate = None\neval_sampling_steps = 2\n"
        "validation = dict(num_inference_steps=2, num_samples=4)\n"
    )
    out = tmp_path / "run"
    ran(
        door(
            "train_scripts/train_diffusers.py", config, "--work-dir", out, "--report_to", "none",
            "--pipeline_load_from", parts / "pipe",
        )
    )  # fmt: skip
    trained = TrainConfig.from_json((out / "config.json").read_text())
    assert (trained.hidden_size, trained.depth, trained.caption_channels) == (32, 1, 32)
    assert sorted(path.name for path in (out / "validation").glob("*.png")) == ["step_0000000.png", "step_0000002.png"]
    assert json.loads((out / "checkpoints/checkpoint-2/transformer/config.json").read_text())["num_layers"] == 1
    assert "base_model: pipe\nbase_model_relation: finetune" in (out / "README.md").read_text()


def test_train_diffusers_needs_a_pipeline(door: Door, parts: Path, config_file: Path, tmp_path: Path) -> None:
    command = ["train_scripts/train_diffusers.py", config_file, "--work-dir", tmp_path / "run"]
    done = door(*command, "--pipeline_load_from", parts / "store")
    assert done.returncode == 2
    assert "store is no diffusers pipeline (it has no transformer, text_encoder, tokenizer, vae)" in done.stderr
