from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diffusion.errors import PromptError
from diffusion.inference import PixArtPipeline, read_recipe
from diffusion.inference.batch import sample_to_folder
from diffusion.inference.sizes import SizedPrompt, binned_size, parse_directives, warn_of_untrained_area
from diffusion.inference.styles import STYLES, apply_style
from tests.inference.tiny_pipeline import load_quietly, write_tiny_pipeline


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", SizedPrompt("a cat")),
        ("a cat --ar 1:1", SizedPrompt("a cat", 1024, 1024)),
        ("a cat --ar 16:9 ", SizedPrompt("a cat", 1344, 768)),  # height:width, as in the original
        ("a cat --ar=9:16", SizedPrompt("a cat", 768, 1344)),
        ("a cat --aspect_ratio 1.5:1", SizedPrompt("a cat", 1216, 832)),
        ("a cat --hw 600:900", SizedPrompt("a cat", 600, 900, binned=True)),
        ("a cat --hw 600x900 --ar 1:1", SizedPrompt("a cat", 600, 900, binned=True)),
        ("a well--known cat -- or not", SizedPrompt("a well--known cat -- or not")),
    ],
)
def test_directives(prompt: str, expected: SizedPrompt) -> None:
    assert parse_directives(prompt, 1024) == expected


@pytest.mark.parametrize("directive", ["--ar 16", "--ar 0:1", "--ar -1:1", "--hw a:b", "--hw 1.5:20", "--hw 9:100000"])
def test_directives_that_cannot_be_read(directive: str) -> None:
    with pytest.raises(PromptError, match=f"^{directive[:4]} .* must be"):
        parse_directives(f"a cat {directive}", 512)


def test_bins_are_the_trained_sizes() -> None:
    assert binned_size(256, 1, 1) == (256, 256)
    assert binned_size(512, 1000, 500) == (704, 352)
    with pytest.raises(PromptError, match="no sizes for a model of 64 px"):
        binned_size(64, 1, 1)


def test_areas_far_from_training_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_untrained_area(1024, 1344, 768)
        assert caplog.text == ""
        warn_of_untrained_area(1024, 512, 512)
    assert "512x512 px has 0.25 times the area" in caplog.text and "give no size to draw its own" in caplog.text


@pytest.mark.parametrize(
    ("height", "width"),
    [(16, 16), (16, 256), (48, 80), (80, 48), (112, 64), (64, 176), (96, 96), (144, 16), (208, 32), (32, 112)],
)
def test_any_multiple_of_16_is_drawn(pipeline: PixArtPipeline, height: int, width: int) -> None:
    image = pipeline("a cat", seed=0, num_inference_steps=1, height=height, width=width).images[0]
    assert image.size == (width, height)


@pytest.fixture(scope="module")
def model_256(tmp_path_factory: pytest.TempPathFactory) -> PixArtPipeline:
    return load_quietly(write_tiny_pipeline(tmp_path_factory.mktemp("sizes") / "m", input_size=32))


def test_binning_draws_a_trained_size_and_cuts_it(model_256: PixArtPipeline) -> None:
    arguments = {"seed": 0, "num_inference_steps": 1, "use_resolution_binning": True}
    assert model_256("a cat", height=101, width=203, output_type="latent", **arguments).images.shape[-2:] == (22, 44)
    output = model_256("a cat", height=101, width=203, **arguments)
    assert output.images[0].size == (203, 101)
    assert output.recipes[0]["drawn_size"] == [176, 352]
    pixels = model_256("a cat", height=101, width=203, output_type="pt", **arguments).images
    assert pixels.shape == (1, 3, 101, 203)


def test_directives_decide_sizes_in_a_folder(model_256: PixArtPipeline, tmp_path: Path) -> None:
    prompts = ["a cat --ar 1:2", "a dog", "a cat --hw 100:60", "a cow --ar 1:2"]
    settings = {"num_inference_steps": 1, "height": 64, "width": 64}
    paths, _ = sample_to_folder(model_256, prompts, tmp_path, model="m", batch_size=4, settings=settings)
    recipes = [read_recipe(path) for path in paths]
    assert [(r["prompt"], r["height"], r["width"]) for r in recipes] == [
        ("a cat", 176, 352),
        ("a dog", 64, 64),
        ("a cat", 100, 60),
        ("a cow", 176, 352),
    ]
    assert [r["seed"] for r in recipes] == [0, 1, 2, 3]
    stamps = [path.stat().st_mtime_ns for path in paths]
    again, _ = sample_to_folder(model_256, prompts, tmp_path, model="m", batch_size=1, settings=settings)
    assert [path.stat().st_mtime_ns for path in again] == stamps


def test_styles_frame_the_prompt() -> None:
    assert len(STYLES) == 10
    for name, (frame, negative) in STYLES.items():
        prompt, avoided = apply_style(name, "a cat --ar 1:2", "ugly")
        assert prompt == frame.format(prompt="a cat") + " --ar 1:2"
        assert avoided == (f"ugly, {negative}" if negative else "ugly")
    assert apply_style("(No style)", "a cat") == ("a cat", None)
    with pytest.raises(PromptError, match="style='anime' is unknown; did you mean 'Anime'"):
        apply_style("anime", "a cat")
