"""ControlNet training on tiny real parts: only the branch learns, is saved, and comes back in every form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.checkpoints import (
    load_controlnet,
    load_transformer,
    open_checkpoint,
    save_transformer,
    write_control_file,
)
from diffusion.config import TrainConfig, load_config
from diffusion.data import SampleKey, collate
from diffusion.errors import CheckpointError, ConfigError, DataError
from diffusion.features import ExtractionSettings, extract_folder
from diffusion.features.exchange import export_original
from diffusion.inference import PixArtPipeline
from diffusion.models import ControlPixArt, PixArt
from diffusion.training import Reporting, Trainer
from diffusion.training.building import build_training_data, denoising_objective
from diffusion.training.control import ControlNet
from tests.models.test_hed import random_hed
from tests.training.tiny_run import ROOT, curve, write_config

SIZES = {"hidden_size": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def edges(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 16 bundled pictures at 32 px with their edges."""
    folder = tmp_path_factory.mktemp("edges")
    settings = ExtractionSettings(image_size=32, dtype="fp32", condition="canny")
    extract_folder(ROOT / "data/emoji", folder / "store", parts / "pipe", settings, limit=16)
    (folder / "pipe").symlink_to(parts / "pipe")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    network = PixArt(**SIZES, caption_channels=32, input_size=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    folder = tmp_path_factory.mktemp("base")
    save_transformer(network, folder / "transformer", stored_null_caption=True)
    return folder


def configured(edges: Path, base: Path, *options: str) -> TrainConfig:
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    common = [*sizes, f"load_from={base}", "copy_blocks_num=2", "class_dropout_prob=0.5"]
    return load_config(write_config(edges / "config.py", edges), [*common, *options])


def run(config: TrainConfig, work_dir: Path, **options: object) -> Trainer:
    torch.set_num_threads(1)
    family, quiet = ControlNet(), Reporting(tensorboard=False)
    trainer = Trainer(config, family.objective, work_dir, reporting=quiet, family=family, **options)  # type: ignore[arg-type]
    trainer.fit()
    return trainer


def test_it_begins_as_the_base_exactly(edges: Path, base: Path, tmp_path: Path) -> None:
    config = configured(edges, base)
    family = ControlNet()
    dataset = build_training_data(config)
    control = family.build_network(config, base, resuming=False)
    batch = collate([dataset[SampleKey(index, index)] for index in range(4)])
    objective = family.objective(config, dataset)
    found = objective.loss(control, batch, 0)
    expected = denoising_objective(config, dataset).loss(load_transformer(base), batch, 0)
    assert torch.equal(found.loss, expected.loss)
    trainable = {name.split(".")[0] for name, parameter in control.named_parameters() if parameter.requires_grad}
    assert trainable == {"controlnet"}
    mean = batch.control_mean
    drawn = objective.further_inputs(batch, 0)["control_latents"]
    assert not torch.equal(drawn, mean * config.scale_factor)  # a sample of the posterior, as the original takes
    assert torch.equal(drawn, objective.further_inputs(batch, 0)["control_latents"])


def test_only_the_branch_learns_is_saved_and_resumes_bit_exact(edges: Path, base: Path, tmp_path: Path) -> None:
    whole = run(configured(edges, base), tmp_path / "whole")
    run(configured(edges, base, "max_steps=3"), tmp_path / "cut")
    resumed = run(configured(edges, base), tmp_path / "cut", resume_from="latest")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    first, second = whole.state.network.state_dict(), resumed.state.network.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    untouched = load_transformer(base).state_dict()
    assert all(torch.equal(first[f"base_model.{key}"].cpu(), tensor) for key, tensor in untouched.items())
    assert first["controlnet.1.after_proj.weight"].abs().max() > 0
    checkpoint = tmp_path / "whole/checkpoints/checkpoint-6"
    weights = [path.relative_to(checkpoint).parts[0] for path in checkpoint.rglob("*.safetensors")]
    assert sorted(weights) == ["controlnet", "controlnet_ema"]


def test_recomputed_blocks_train_the_same(edges: Path, base: Path, tmp_path: Path) -> None:
    run(configured(edges, base, "max_steps=2"), tmp_path / "kept")
    run(configured(edges, base, "max_steps=2", "grad_checkpointing=True"), tmp_path / "recomputed")
    assert curve(tmp_path / "recomputed") == curve(tmp_path / "kept")
    assert curve(tmp_path / "recomputed", "grad_norm") == pytest.approx(curve(tmp_path / "kept", "grad_norm"))


def test_a_checkpoint_opens_beside_its_base_and_as_a_published_file(edges: Path, base: Path, tmp_path: Path) -> None:
    trainer = run(configured(edges, base, "max_steps=2"), tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    network = load_transformer(base)
    opened = load_controlnet(checkpoint, network)
    trained = trainer.state.network.state_dict()
    assert all(torch.equal(tensor, trained[key].cpu()) for key, tensor in opened.state_dict().items())
    averaged = load_controlnet(checkpoint, network, ema=True).controlnet[1].after_proj.weight
    assert not torch.equal(averaged, opened.controlnet[1].after_proj.weight)

    file = write_control_file(opened, tmp_path / "published.pth")
    keys = torch.load(file, weights_only=True)["state_dict"].keys()
    assert "base_model.blocks.0.attn.qkv.weight" in keys and "controlnet.0.before_proj.weight" in keys
    published = open_checkpoint(file, num_heads=2)
    assert published.found.control_blocks == 2
    assert torch.equal(
        published.build_control().controlnet[1].after_proj.weight, opened.controlnet[1].after_proj.weight
    )

    with pytest.raises(CheckpointError, match="is the branch of a ControlNet alone; give the base"):
        load_controlnet(checkpoint)
    with pytest.raises(CheckpointError, match="give it as --controlnet beside the base"):
        load_transformer(checkpoint)
    with pytest.raises(CheckpointError, match="the branch of a ControlNet without its base"):
        load_transformer(checkpoint / "controlnet/diffusion_pytorch_model.safetensors")
    other = PixArt(**{**SIZES, "hidden_size": 48}, caption_channels=32, input_size=4)
    with pytest.raises(CheckpointError, match="another kind of model: the base given has hidden_size=48 instead of 32"):
        load_controlnet(checkpoint, other)


def test_the_pipeline_draws_with_it(edges: Path, base: Path, tmp_path: Path) -> None:
    trainer = run(configured(edges, base, "max_steps=1"), tmp_path / "run")
    with torch.no_grad():
        for block in trainer.state.network.controlnet:
            block.after_proj.weight.add_(0.1)
    pipeline = PixArtPipeline.from_pretrained(edges / "pipe", transformer=base)
    pipeline.set_progress_bar_config(disable=True)
    options = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    plain = pipeline("a cat", **options).images
    pipeline.controlnet = load_controlnet(tmp_path / "run/checkpoints/checkpoint-1", pipeline.transformer)
    pipeline.controlnet.controlnet.load_state_dict(trainer.state.network.controlnet.state_dict())
    given = {**options, "control_image": torch.ones(3, 32, 32)}
    assert torch.equal(pipeline("a cat", **given, controlnet_conditioning_scale=0.0).images, plain)
    assert not torch.equal(pipeline("a cat", **given).images, plain)


def test_validation_draws_conditions(edges: Path, base: Path, tmp_path: Path) -> None:
    options = ["max_steps=20", "validation.every_steps=20", "validation.at_start=True", "validation.num_samples=2"]
    options += [
        "validation.prompts=['a','b']",
        "validation.num_inference_steps=2",
        "train_batch_size=8",
        "ema_rate=0.5",
    ]
    run(configured(edges, base, *options), tmp_path / "run")
    validation = curve(tmp_path / "run", "validation_loss")
    assert validation[20] < validation[0]
    assert (tmp_path / "run/validation/step_0000020.png").is_file()
    card, drawn = (
        (tmp_path / "run/README.md").read_text(),
        json.loads((tmp_path / "run/validation/grid.json").read_text()),
    )
    assert drawn["prompts"] != ["a", "b"]  # captions of held-out pictures, and the card names them
    assert "Prompts " + ", ".join(f"`{prompt}`" for prompt in drawn["prompts"]) in card
    assert "| control blocks |" in card


def test_conditions_are_computed_in_every_step(parts: Path, base: Path, tmp_path: Path) -> None:
    torch.save(random_hed().state_dict(), tmp_path / "hed.pth")
    options = ["max_steps=1", "train_batch_size=1", f"hed_path={tmp_path / 'hed.pth'}"]
    for condition in ("canny", "hed"):
        config = configured(parts, base, *options, f"control_condition={condition}")
        trainer = run(config, tmp_path / condition)
        batch = collate([trainer.dataset[SampleKey(0, 0)]]).to(trainer.ranks.device)
        inputs = trainer.objective.further_inputs(batch, 0)  # type: ignore[union-attr]
        assert inputs["control_latents"].shape == (1, 4, 4, 4)


def hed_layout(edges: Path, root: Path) -> Path:
    """The original's InternalDataHed, made of the store."""
    export_original(edges / "store", root)
    (root / "partition").rename(root / "partition_filter")
    (root / "caption_feature_wmask").rename(root / "caption_features")
    dataset = build_training_data(load_config(write_config(edges / "config.py", edges), ["data.split=None"]))
    for index in range(len(dataset)):
        sample = dataset[SampleKey(index, index)]
        path = (root / "hed_feature_32" / sample.key).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, torch.cat([sample.control_mean, sample.control_std]).numpy())
    return root


def test_the_originals_hed_layout_trains(edges: Path, base: Path, tmp_path: Path) -> None:
    hed_layout(edges, tmp_path / "InternData")
    options = ["data={'type':'InternalDataHed','root':'InternData','image_list_json':['data_info.json']}"]
    options += [f"data_root={tmp_path}", "null_caption=stored", "max_steps=2", "validation.num_samples=0"]
    options += ["pipeline_load_from=None"]
    trainer = run(configured(edges, base, *options), tmp_path / "run")
    assert len(trainer.dataset) == 16 and trainer.state.step == 2
    sample = trainer.dataset[SampleKey(3, 0)]
    assert sample.control_mean.shape == (4, 4, 4) and sample.img_hw == (32.0, 32.0)
    assert len(build_training_data(configured(edges, base, *options, "train_ratio=0.25"))) == 4
    (tmp_path / "InternData/hed_feature_32" / sample.key).with_suffix(".npz").unlink()
    with pytest.raises(DataError, match=r"npz does not exist \(1 feature files are missing\)"):
        build_training_data(configured(edges, base, *options))


def test_what_cannot_work_is_explained(edges: Path, base: Path, parts: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, config: TrainConfig, **arguments: object) -> None:
        shutil.rmtree(tmp_path / "none", ignore_errors=True)
        work_dir = arguments.pop("work_dir", tmp_path / "none")
        with pytest.raises(error, match=match):
            Trainer(config, ControlNet().objective, work_dir, family=ControlNet(), **arguments)  # type: ignore[arg-type]

    refused(
        ConfigError, "the base is missing; give its weights with --load-from", configured(edges, base, "load_from=None")
    )
    refused(ConfigError, "copy_blocks_num=3: .* between 1 and 2", configured(edges, base, "copy_blocks_num=3"))
    refused(ConfigError, "its samples have no condition; extract them with --condition", configured(parts, base))
    refused(ConfigError, "computes what data.root=.* holds", configured(edges, base, "control_condition=canny"))
    refused(ConfigError, "train_ratio is read by", configured(edges, base, "train_ratio=0.5"))
    absent = configured(parts, base, "control_condition=hed", f"hed_path={tmp_path / 'ControlNetHED.pth'}")
    refused(CheckpointError, "ControlNetHED.pth of PixArt-alpha/PixArt-alpha: put it there", absent)
    run(configured(edges, base, "max_steps=1"), tmp_path / "run")
    other = load_transformer(base)
    other.t_block[1].bias.data += 1
    save_transformer(other, tmp_path / "other/transformer")
    arguments = {"work_dir": tmp_path / "run", "resume_from": "latest"}
    changed = configured(edges, base, f"load_from={tmp_path / 'other'}")
    refused(ConfigError, "was trained with another fingerprint of base", changed, **arguments)
    refused(CheckpointError, "is a ControlNet", configured(edges, base, f"load_from={control_file(base, tmp_path)}"))


def control_file(base: Path, folder: Path) -> Path:
    return write_control_file(ControlPixArt(load_transformer(base), 2), folder / "control.safetensors")


def test_a_model_with_size_conditions_trains(edges: Path, tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 48}
    network = PixArt(**sizes, caption_channels=32, input_size=4, micro_condition=True)
    save_transformer(network, tmp_path / "base/transformer", stored_null_caption=True)
    options = ["model=PixArtMS_Ti_2", "micro_condition=True", "hidden_size=48", "max_steps=1"]
    trainer = run(configured(edges, tmp_path / "base", *options), tmp_path / "run")
    assert trainer.state.network.config.micro_condition
    opened = load_controlnet(tmp_path / "run/checkpoints/checkpoint-1", load_transformer(tmp_path / "base"))
    assert opened.config.micro_condition
