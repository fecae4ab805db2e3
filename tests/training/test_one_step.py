"""DMD on tiny real parts: pairs, what trains, exact resume, drawing in one step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import load_transformer, save_transformer
from diffusion.config import TrainConfig, load_config
from diffusion.data import SampleKey
from diffusion.errors import CheckpointError, ConfigError, DataError, PromptError
from diffusion.features import FeatureStore
from diffusion.inference import PixArtPipeline
from diffusion.inference.solvers import make_one_step_scheduler
from diffusion.models import PixArt
from diffusion.models.lpips import LPIPS
from diffusion.objectives import OneStepNetworks, pair_noise
from diffusion.training import Reporting, Trainer
from diffusion.training.one_step import DMD, write_pairs
from tests.training.test_control import SIZES, base
from tests.training.tiny_run import curve, weights, write_config

__all__ = ["base"]  # the fixture


@pytest.fixture(scope="module")
def pairs(parts: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of what the base draws, and the pipeline of the store it came from."""
    folder = tmp_path_factory.mktemp("pairs")
    pipeline = PixArtPipeline.from_pretrained(parts / "pipe", transformer=base, algorithm="ddim")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 5}
    assert write_pairs(parts / "store", folder / "store", pipeline, limit=12, **options) == 12
    row = FeatureStore(folder / "store").row(3)
    noise = pair_noise([row.key], (4, 4, 4))
    drawn = pipeline(
        row.captions,
        latents=noise,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="latent",
    ).images[0]
    torch.testing.assert_close(row.latents_mean * pipeline.vae.config.scaling_factor, drawn, atol=1e-4, rtol=1e-4)
    with pytest.raises(DataError, match="holds a store already"):
        write_pairs(parts / "store", folder / "store", pipeline, limit=1, **options)
    (folder / "pipe").symlink_to(parts / "pipe")
    return folder


def configured(pairs: Path, base: Path, tmp_path: Path, *options: str) -> TrainConfig:
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    common = [*sizes, f"load_from={base}", "class_dropout_prob=0.0", "data.split=None", "validation.num_samples=0"]
    return load_config(write_config(tmp_path / "config.py", pairs), [*common, *options])


def run(config: TrainConfig, work_dir: Path, **options: object) -> Trainer:
    torch.set_num_threads(1)
    family, quiet = DMD(), Reporting(tensorboard=False)
    trainer = Trainer(config, family.objective, work_dir, reporting=quiet, family=family, **options)  # type: ignore[arg-type]
    trainer.fit()
    return trainer


def test_resume_is_bit_exact_and_both_networks_learn(pairs: Path, base: Path, tmp_path: Path) -> None:
    options = ["regression_weight=0.25", "validation.every_steps=6", "validation.prompts=['a cat']"]
    whole = run(configured(pairs, base, tmp_path, *options), tmp_path / "whole")
    run(configured(pairs, base, tmp_path, *options, "max_steps=3"), tmp_path / "cut")
    resumed = run(configured(pairs, base, tmp_path, *options), tmp_path / "cut", resume_from="latest")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    first, second = whole.state.network.state_dict(), resumed.state.network.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = load_transformer(base).t_block[1].bias
    for name in ("generator", "fake"):
        assert not torch.equal(first[f"{name}.t_block.1.bias"].cpu(), start)
    assert set(weights(tmp_path / "whole", 6, "transformer_ema")) == set(
        weights(tmp_path / "whole", 6, "fake_score/transformer")
    )
    assert (tmp_path / "whole/validation/step_0000006.png").is_file()


def test_compilation_takes_the_blocks_of_both_networks() -> None:
    network = OneStepNetworks(*(PixArt(**SIZES, caption_channels=32, input_size=4) for _ in range(2)))
    network.compile_blocks(dynamic=False)
    for part in (network.generator, network.fake):
        assert all(block._compiled_call_impl is not None for block in part.blocks)


def test_the_generator_draws_in_one_step(pairs: Path, base: Path, tmp_path: Path) -> None:
    grid = ["validation.prompts=['a cat']", "validation.every_steps=1"]
    trainer = run(configured(pairs, base, tmp_path, "max_steps=1", *grid), tmp_path / "run")
    card = (tmp_path / "run/README.md").read_text()
    assert "Prompts `a cat`; 1 step, guidance 1, " in card and "| timestep of the one step | 400 |" in card
    checkpoint = tmp_path / "run/checkpoints/checkpoint-1"
    pipeline = PixArtPipeline.from_pretrained(pairs / "pipe", transformer=checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_one_step_scheduler(400)
    noise = torch.randn(1, 4, 4, 4)
    arguments = {"latents": noise, "guidance_scale": 1.0, "output_type": "latent", "seed": 0, "height": 32, "width": 32}
    drawn = pipeline("a cat", num_inference_steps=1, **arguments).images
    embeds, mask = pipeline.encode_captions(["a cat"])
    with torch.no_grad():
        eps = trainer.state.network.generator.cpu()(noise, torch.tensor([400.0]), embeds, mask)[:, :4]
    expected = trainer.objective.process.predict_x0(noise, torch.tensor([400]), eps)  # type: ignore[union-attr]
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(PromptError, match="num_inference_steps=4 must be 1"):
        pipeline("a cat", num_inference_steps=4, **arguments)


def test_lpips_is_read_by_its_path(pairs: Path, base: Path, tmp_path: Path) -> None:
    state = LPIPS().state_dict()
    state |= {f"lins.{key.removeprefix('lin')}": t for key, t in state.items() if key.startswith("lin")}
    torch.save(state, tmp_path / "lpips.pth")
    options = ["regression_weight=0.25", "max_steps=1", "train_batch_size=2", f"lpips_weights={tmp_path / 'lpips.pth'}"]
    trainer = run(configured(pairs, base, tmp_path, *options), tmp_path / "run")
    distance = trainer.objective.distance  # type: ignore[union-attr]
    latents = trainer.dataset[SampleKey(0, 0)].latents_mean[None].float().to(trainer.ranks.device).requires_grad_()
    distance(latents, latents.detach() + 0.5).sum().backward()
    assert latents.grad.abs().max() > 0


def test_what_cannot_work_is_explained(pairs: Path, parts: Path, base: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, folder: Path, *options: str) -> None:
        config = configured(folder, base, tmp_path, *options)
        with pytest.raises(error, match=match):
            Trainer(config, DMD().objective, tmp_path / match[:9], family=DMD())

    refused(ConfigError, "needs pairs, which data.root", parts, "regression_weight=0.25")
    refused(ConfigError, "lpips_weights has no effect", pairs, "lpips_weights=x.pth")
    refused(ConfigError, "the teacher is missing", pairs, "load_from=None")
    save_transformer(load_transformer(base), tmp_path / "other/transformer")
    torch.save({"a": torch.zeros(1)}, tmp_path / "no.pth")
    weights_of_another = f"lpips_weights={tmp_path / 'no.pth'}"
    refused(CheckpointError, "does not fit the model", pairs, "regression_weight=0.25", weights_of_another)
