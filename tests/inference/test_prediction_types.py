"""Drawing with a network that predicts velocity: every way of drawing gives what the same network of noise gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PixArtAlphaPipeline
from PIL import Image

from diffusion.checkpoints import open_checkpoint, save_transformer
from diffusion.checkpoints.conversion import write_diffusers, write_native
from diffusion.errors import CheckpointError, PromptError
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.inference.reference import PixArtReferencePipeline
from diffusion.inference.solvers import ALGORITHMS, make_one_step_scheduler, scheduler_predicts, stock_scheduler
from tests.inference.tiny_pipeline import SIZE_PX, load_quietly, tiny_transformer, write_tiny_pipeline
from tests.velocity_twin import velocity_twin

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE_PX, SIZE_PX, 3), np.uint8))
MASK = Image.fromarray(np.repeat(np.arange(SIZE_PX) < SIZE_PX // 2, SIZE_PX).reshape(SIZE_PX, SIZE_PX))
ARGUMENTS: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def pair(pipeline_folder: Path) -> tuple[PixArtPipeline, PixArtPipeline]:
    """A pipeline around a network of noise, and one around its twin."""
    of_noise = load_quietly(pipeline_folder)
    of_velocity = load_quietly(pipeline_folder, transformer=velocity_twin(of_noise.transformer))
    assert scheduler_predicts(of_velocity.scheduler) == "v_prediction"
    return of_noise, of_velocity


def draw_both(pair: tuple[PixArtPipeline, PixArtPipeline], algorithm: str, **arguments: Any) -> list[torch.Tensor]:
    drawn = []
    for pipeline, kind in zip(pair, ("epsilon", "v_prediction")):
        pipeline.scheduler = make_scheduler(algorithm, prediction_type=kind)
        drawn.append(pipeline("a red apple", **{**ARGUMENTS, **arguments}).images)
    return drawn


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_solver(pair: tuple[PixArtPipeline, PixArtPipeline], algorithm: str) -> None:
    expected, found = draw_both(pair, algorithm)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.std().item())


@pytest.mark.parametrize(
    "arguments",
    [{"guidance_channels": 3}, {"image": PICTURE, "strength": 0.6}, {"image": PICTURE, "mask_image": MASK}],
    ids=["three guided channels", "image to image", "inpainting"],
)
def test_every_way(pair: tuple[PixArtPipeline, PixArtPipeline], arguments: dict[str, Any]) -> None:
    expected, found = draw_both(pair, "iddpm", **arguments)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.std().item())


def test_one_step_and_the_reference_pipeline(pair: tuple[PixArtPipeline, PixArtPipeline]) -> None:
    drawn, beside = [], []
    for pipeline, kind in zip(pair, ("epsilon", "v_prediction")):
        pipeline.scheduler = make_one_step_scheduler(400, kind)
        drawn.append(pipeline("a red apple", **{**ARGUMENTS, "num_inference_steps": 1}).images)
        pipeline.scheduler = make_scheduler("dpm-solver", prediction_type=kind)
        reference = PixArtReferencePipeline(**pipeline.components)
        reference.set_progress_bar_config(disable=True)
        options = {**ARGUMENTS, "output_type": "pt", "reference_image": PICTURE}
        beside.append(reference("a red apple", **options).images)
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(beside[1], beside[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_stock_solver_knows_velocity(algorithm: str, tmp_path: Path) -> None:
    stock_scheduler(make_scheduler(algorithm, prediction_type="v_prediction")).save_pretrained(tmp_path)
    opened = DDPMScheduler.load_config(tmp_path)
    assert opened["prediction_type"] == "v_prediction"


# ---- a folder and its scheduler ----


def whole_folder(tmp_path: Path) -> Path:
    """A folder that stock diffusers opens, of a network of noise."""
    load_quietly(write_tiny_pipeline(tmp_path / "tiny")).save_pretrained(tmp_path / "parts")
    return tmp_path / "parts"


def test_weights_without_a_mark_predict_what_the_folders_scheduler_says(tmp_path: Path) -> None:
    """As a stock pipeline that others trained for velocity."""
    whole = whole_folder(tmp_path)
    stock = PixArtAlphaPipeline.from_pretrained(str(whole))
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, prediction_type="v_prediction")
    stock.save_pretrained(str(tmp_path / "stock"))
    found = open_checkpoint(tmp_path / "stock").found
    assert found.config.prediction_type == "v_prediction"
    assert scheduler_predicts(load_quietly(tmp_path / "stock").scheduler) == "v_prediction"
    # Weights from elsewhere, which predict noise: the folder's scheduler is set up for them, not taken as it is.
    own = tiny_transformer()
    save_transformer(own, tmp_path / "own/transformer")
    mixed = load_quietly(tmp_path / "stock", transformer=tmp_path / "own")
    assert scheduler_predicts(mixed.scheduler) == "epsilon"
    mixed.scheduler = make_scheduler("ddim", prediction_type="v_prediction")
    with pytest.raises(PromptError, match="the transformer predicts epsilon, the scheduler is for v_prediction"):
        mixed("a cat", num_inference_steps=1)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, prediction_type="sample")
    stock.save_pretrained(str(tmp_path / "sample"))
    with pytest.raises(CheckpointError, match="predicts sample, as its scheduler says; only epsilon, v_prediction"):
        open_checkpoint(tmp_path / "sample")


def test_conversions_keep_the_kind(tmp_path: Path) -> None:
    parts = whole_folder(tmp_path)
    save_transformer(tiny_transformer(prediction_type="v_prediction"), tmp_path / "v/transformer")
    checkpoint = open_checkpoint(tmp_path / "v")
    write_diffusers(checkpoint, tmp_path / "whole", parts=parts)
    stock = PixArtAlphaPipeline.from_pretrained(str(tmp_path / "whole"))
    assert stock.scheduler.config.prediction_type == "v_prediction"
    write_native(checkpoint, tmp_path / "single.safetensors")
    assert open_checkpoint(tmp_path / "single.safetensors").found.config.prediction_type == "v_prediction"
    with pytest.raises(CheckpointError, match=r"a \.pth cannot say that its network predicts v_prediction"):
        write_native(checkpoint, tmp_path / "single.pth")
    save_transformer(tiny_transformer(prediction_type="flow", pred_sigma=False), tmp_path / "flow/transformer")
    with pytest.raises(CheckpointError, match="has a scheduler for epsilon, the transformer predicts flow"):
        write_diffusers(open_checkpoint(tmp_path / "flow"), tmp_path / "other", parts=parts)
    assert not (tmp_path / "other").exists()
