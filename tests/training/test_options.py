"""Options of the objective, from the config to what a run leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from PIL import Image

from diffusion.config import load_config
from diffusion.data import SampleKey
from diffusion.errors import ConfigError, DataError
from diffusion.images import decode_latents, labelled_grid, load_vae, to_pil
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.process import LogitNormal
from diffusion.ranks import Ranks
from diffusion.training import build_network, denoising_objective
from diffusion.training.building import build_training_data, model_options
from diffusion.training.optimization import build_optimizer
from diffusion.training.starting import new_network
from diffusion.training.validation import ValidationLoss
from tests.training.tiny_run import ROOT, curve, run, weights


def test_a_network_without_variance_trains_and_samples(config_file: Path, parts: Path, tmp_path: Path) -> None:
    """pred_sigma=False: four output channels through training, checkpoint, our pipeline and the stock one."""
    options = ["pred_sigma=False", "max_steps=3", "validation.every_steps=3", "process.min_snr_gamma=5.0"]
    options += ["process.timestep_sampling=logit_normal", "validation.prompts=['red apple']"]
    run(load_config(config_file, options), tmp_path / "run")
    assert weights(tmp_path / "run", 3)["proj_out.weight"].shape[0] == 2 * 2 * 4
    assert (tmp_path / "run/validation/step_0000003.png").is_file()
    assert np.isfinite(curve(tmp_path / "run", "validation_loss")[3])

    resumed = run(load_config(config_file, [*options, "max_steps=4"]), tmp_path / "run", resume_from="latest")
    assert resumed.state.step == 4

    pipeline = PixArtPipeline.from_pretrained(parts / "pipe", transformer=tmp_path / "run/checkpoints/checkpoint-4")
    assert pipeline.transformer.config.out_channels == 4
    pipeline.save_pretrained(tmp_path / "pipe")
    stock = PixArtAlphaPipeline.from_pretrained(str(tmp_path / "pipe"))
    for each in (pipeline, stock):
        each.set_progress_bar_config(disable=True)
    mine = pipeline("a red apple", num_inference_steps=3, seed=5).images[0]
    theirs = stock(
        "a red apple",
        num_inference_steps=3,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(5),
        clean_caption=False,
        use_resolution_binning=False,
    ).images[0]
    assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= 2
    for solver in ("iddpm", "sa-solver"):
        pipeline.scheduler = make_scheduler(solver)
        for scale in (1.0, 4.5):
            assert pipeline("a red apple", num_inference_steps=4, guidance_scale=scale, seed=5).images[0].size == (
                32,
                32,
            )


def test_the_variance_of_a_run_without_the_bound_stays_untouched(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["learn_sigma=False", "max_steps=2", "optimizer.weight_decay=0.0"])
    run(config, tmp_path / "run")
    rows = weights(tmp_path / "run", 2)["proj_out.weight"].view(2, 2, 8, -1)  # (patch, patch, 2C, D)
    assert rows[:, :, :4].abs().max() > 0
    assert rows[:, :, 4:].abs().max() == 0  # a fresh network's rows


@pytest.mark.parametrize("options", [[], ["process.logit_mean=-0.5", "process.logit_std=0.7"]])
def test_validation_draws_uniformly_whatever_training_does(options: list[str], config_file: Path) -> None:
    skewed = ["process.timestep_sampling=logit_normal", *options]
    torch.manual_seed(0)
    network = build_network(load_config(config_file))
    losses = []
    for chosen in ([], skewed):
        config = load_config(config_file, chosen)
        objective = denoising_objective(config, build_training_data(config))
        losses.append(ValidationLoss(config, objective, Ranks("cpu"))(network))
    assert objective.logit_normal == (LogitNormal(-0.5, 0.7) if options else LogitNormal())
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_compile_few_times(config_file: Path, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    run(load_config(config_file, ["max_steps=5", "depth=10"]), tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    run(load_config(config_file, ["max_steps=5", "depth=10", "compile=True"]), tmp_path / "compiled")
    plain, compiled = curve(tmp_path / "plain"), curve(tmp_path / "compiled")
    assert all(compiled[step] == pytest.approx(loss, rel=1e-4) for step, loss in plain.items())
    assert weights(tmp_path / "compiled", 5).keys() == weights(tmp_path / "plain", 5).keys()
    # Ten blocks, several caption lengths: once in training, where captions are padded to one length, and in validation
    # without gradients.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_a_config_can_change_the_size_of_a_registered_network(config_file: Path) -> None:
    network = build_network(load_config(config_file, ["hidden_size=48", "depth=3", "num_heads=2"]))
    assert (network.config.hidden_size, len(network.blocks), network.config.num_heads) == (48, 3, 2)
    with pytest.raises(ConfigError, match="hidden_size"):
        build_network(load_config(config_file, ["hidden_size=50", "num_heads=4"]))


def with_optimizer(config_file: Path, section: str) -> Path:
    """The config with another optimiser; an override could not take keys of the first one away."""
    config_file.write_text(config_file.read_text() + f"optimizer = dict({section})\n")
    return config_file


@pytest.mark.parametrize(
    "section",
    [
        pytest.param("type='Muon', lr=2e-3, weight_decay=0.01", marks=pytest.mark.slow),
        "type='Lion', lr=3e-4",
        pytest.param(
            "type='CAMEWrapper', lr=1e-4, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16)", marks=pytest.mark.slow
        ),
        pytest.param("type='Prodigy', lr=1.0", marks=pytest.mark.slow),
        "type='SGD', lr=0.05, momentum=0.9",
    ],
)
def test_every_optimiser_learns_and_resumes_bit_for_bit(section: str, config_file: Path, tmp_path: Path) -> None:
    with_optimizer(config_file, section)
    options = ["max_steps=12", "save_model_steps=6", "lr_schedule_args.num_warmup_steps=0"]
    whole = run(load_config(config_file, options), tmp_path / "whole")
    run(load_config(config_file, [*options, "max_steps=6"]), tmp_path / "cut")
    resumed = run(load_config(config_file, options), tmp_path / "cut", resume_from="latest")
    expected = whole.state.network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.state.network.state_dict().items())
    losses = list(curve(tmp_path / "whole").values())
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_muon_takes_the_matrices_of_the_blocks_alone(config_file: Path) -> None:
    config = load_config(with_optimizer(config_file, "type='Muon', lr=1e-3, weight_decay=0.1"))
    network = build_network(config)
    groups = build_optimizer(network, config, 4).param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    muon = {names[id(p)] for group in groups if group["use_muon"] for p in group["params"]}
    assert {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "blocks.1.cross_attn.kv_linear.weight"} <= muon
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in muon)
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    assert {(group["use_muon"], group["weight_decay"]) for group in groups} == {(True, 0.1), (False, 0.1), (False, 0.0)}


def test_features_of_other_encoders_than_the_pipeline_are_refused(
    config_file: Path, parts: Path, tmp_path: Path
) -> None:
    shutil.copytree(parts / "pipe", tmp_path / "other")
    vae = load_vae(tmp_path / "other")
    next(vae.parameters()).data.add_(1)
    vae.save_pretrained(tmp_path / "other" / "vae")
    assert len(build_training_data(load_config(config_file))) > 0
    config = load_config(config_file, [f"pipeline_load_from={tmp_path / 'other'}"])
    with pytest.raises(DataError, match=r"another vae than pipeline_load_from=.*--pretrained"):
        build_training_data(config)


def test_the_first_batch_is_shown_as_it_is_trained_on(config_file: Path, parts: Path, tmp_path: Path) -> None:
    trainer = run(load_config(config_file, ["max_steps=1"]), tmp_path / "run")
    sheet = Image.open(tmp_path / "run" / "first_batch.png")
    vae, dataset = load_vae(parts / "pipe"), trainer.dataset
    first = trainer.sampler.plan(0)[0]
    pictures = []
    for number, index in enumerate(first):
        latents = dataset[SampleKey(index, number)].latents_mean.float()[None] * vae.config.scaling_factor
        pictures.append(to_pil(decode_latents(vae, latents)[0]))
    captions = [dataset.caption_of(SampleKey(index, number)) for number, index in enumerate(first)]
    assert all(caption in dataset.store.row(dataset.rows[i]).captions for caption, i in zip(captions, first))
    assert np.array_equal(np.asarray(sheet), np.asarray(labelled_grid(pictures, captions, columns=4)))


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_one_line_says_what_the_bundled_model_predicts(kind: str, tmp_path: Path) -> None:
    """Every config that trains or tunes the bundled model follows it."""
    shutil.copytree(ROOT / "configs/emoji", tmp_path / "emoji")
    base = tmp_path / "emoji/emoji_base.py"
    line = 'prediction_type="v_prediction",'
    assert base.read_text().count(line) == 1
    base.write_text(base.read_text().replace(line, f'prediction_type="{kind}",'))
    for path in sorted((tmp_path / "emoji").rglob("*.py")):
        config = load_config(path, notify=lambda line: None)
        assert config.process.prediction_type == kind, path.name
        assert config.process.min_snr_gamma is None
        with torch.device("meta"):
            network = new_network(config.model, model_options(config))
        assert (network.config.prediction_type, network.config.pred_sigma) == (kind, True)
