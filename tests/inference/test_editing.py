from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import PromptError
from diffusion.images import decode_latents, encode_moments, to_pil, to_tensor
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.inference.denoising import noised
from diffusion.inference.solvers import ALGORITHMS
from tests.inference.tiny_pipeline import SIZE_PX


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth colours, so that scaling changes little."""
    rows, cols = np.mgrid[0:SIZE_PX, 0:SIZE_PX] * 3
    return Image.fromarray(np.stack([rows, cols, 255 - rows], axis=-1).astype(np.uint8))


def half_mask() -> Image.Image:
    mask = Image.new("L", (SIZE_PX, SIZE_PX), 0)
    mask.paste(255, (SIZE_PX // 2, 0, SIZE_PX, SIZE_PX))
    return mask


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_strength_0_is_the_round_trip_of_the_vae(
    pipeline: PixArtPipeline, picture: Image.Image, algorithm: str
) -> None:
    pipeline.scheduler = make_scheduler(algorithm)
    drawn = pipeline("a cat", seed=0, num_inference_steps=4, image=picture, strength=0).images[0]
    mean = encode_moments(pipeline.vae, to_tensor(picture)[None])[0]
    expected = to_pil(decode_latents(pipeline.vae, mean * pipeline.vae.config.scaling_factor)[0])
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


@pytest.mark.parametrize("algorithm", ["dpm-solver", "sa-solver", "iddpm", "ddim", "deis"])
def test_more_strength_goes_further_from_the_picture(
    pipeline: PixArtPipeline, picture: Image.Image, algorithm: str
) -> None:
    pipeline.scheduler = make_scheduler(algorithm)
    source = encode_moments(pipeline.vae, to_tensor(picture)[None])[0] * pipeline.vae.config.scaling_factor

    def distance(strength: float) -> float:
        arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 10, "output_type": "latent"}
        return (pipeline("a cat", image=picture, strength=strength, **arguments).images - source).norm().item()

    distances = [distance(strength) for strength in (0, 0.2, 0.6, 1)]
    assert distances == sorted(distances) and distances[0] == 0 and distances[1] > 0.01


def test_strength_1_is_drawing_from_noise(pipeline: PixArtPipeline, picture: Image.Image) -> None:
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 3, "output_type": "latent"}
    assert torch.equal(
        pipeline("a cat", image=picture, strength=1.0, **arguments).images, pipeline("a cat", **arguments).images
    )


@pytest.mark.parametrize("algorithm", ["dpm-solver", "iddpm", "lcm"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_unmasked_pixels_stay_bit_for_bit(
    pipeline: PixArtPipeline, picture: Image.Image, algorithm: str, strength: float
) -> None:
    pipeline.scheduler = make_scheduler(algorithm)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 4, "image": picture, "mask_image": half_mask()}
    drawn = np.asarray(pipeline("a cat", strength=strength, **arguments).images[0])
    original = np.asarray(picture)
    half = SIZE_PX // 2
    assert np.array_equal(drawn[:, :half], original[:, :half])
    assert np.abs(drawn[:, half:].astype(int) - original[:, half:]).max() > 20


def test_kept_latents_are_the_sources_under_the_noise_of_the_next_step(
    pipeline: PixArtPipeline, picture: Image.Image
) -> None:
    seen: list[torch.Tensor] = []
    noise = torch.randn(1, 4, SIZE_PX // 8, SIZE_PX // 8, generator=torch.Generator().manual_seed(5))
    pipeline(
        "a cat",
        latents=noise,
        seed=0,
        num_inference_steps=4,
        image=picture,
        mask_image=half_mask(),
        callback_on_step_end=lambda pipe, step, timestep, state: seen.append(state["latents"]),
    )
    source = encode_moments(pipeline.vae, to_tensor(picture)[None])[0] * pipeline.vae.config.scaling_factor
    half = SIZE_PX // 16
    for step, latents in enumerate(seen):
        timestep = pipeline.scheduler.timesteps[step + 1] if step < 3 else None
        expected = noised(pipeline.scheduler, source, noise, timestep)
        torch.testing.assert_close(latents[..., :half], expected[..., :half])
        assert not torch.allclose(latents[..., half:], expected[..., half:], atol=0.1)


def test_pictures_of_other_sizes_are_cut_and_batches_take_one_each(
    pipeline: PixArtPipeline, picture: Image.Image
) -> None:
    wide = Image.new("RGB", (200, 100), "green")
    output = pipeline(["a", "b"], seed=0, num_inference_steps=2, image=[picture, wide], strength=0, height=64, width=96)
    assert [image.size for image in output.images] == [(96, 64)] * 2
    assert output.recipes[0]["strength"] == 0 and len(output.recipes[0]["image"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 1.5}, "strength=1.5 must be a number in 0..1"),
        ({"strength": float("nan")}, "strength=nan must be"),
        ({"mask_image": half_mask()}, "mask_image is given without image"),
        (
            {"image": half_mask().resize((333, 200)), "mask_image": half_mask().resize((333, 100))},
            "mask_image is 333x100 px, image 333x200 px",
        ),
        ({"image": "cat.png"}, "'cat.png' is no picture; give a PIL image"),
        ({"image": torch.zeros(3, 8, 8)}, r"image of shape \(3, 8, 8\) must be \(3, 64, 64\)"),
        ({"image": [half_mask()] * 3}, "image has 3 pictures for 1 that are drawn"),
    ],
)
def test_wrong_sources_are_refused(pipeline: PixArtPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        pipeline("a cat", num_inference_steps=2, **arguments)


def test_the_program_begins_from_a_picture(
    pipeline_folder: Path, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion.inference import read_recipe
    from tests.inference.test_batch import run_script

    picture.save(tmp_path / "source.png")
    half_mask().save(tmp_path / "mask.png")
    options = ["--model_path", str(pipeline_folder), "--prompt", "a cat", "--step", "2", "--device", "cpu"]
    files = ["--image", str(tmp_path / "source.png"), "--mask", str(tmp_path / "mask.png")]
    for _ in range(2):  # the second call finds the picture
        run_script(monkeypatch, *options, *files, "--output", str(tmp_path / "out"))
    (drawn,) = (tmp_path / "out").iterdir()
    assert read_recipe(drawn)["strength"] == 1.0
    assert np.array_equal(np.asarray(Image.open(drawn))[:, :32], np.asarray(picture)[:, :32])
