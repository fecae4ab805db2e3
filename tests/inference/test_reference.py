from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import PromptError
from diffusion.inference.reference import PixArtReferencePipeline
from tests.inference.tiny_pipeline import SIZE_PX, write_tiny_pipeline

OPTIONS = {"seed": 0, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> PixArtReferencePipeline:
    folder: Path = write_tiny_pipeline(tmp_path_factory.mktemp("reference") / "tiny")
    pipeline = PixArtReferencePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(colour: str) -> Image.Image:
    return Image.new("RGB", (SIZE_PX, SIZE_PX), colour)


def test_it_is_the_right_half_of_inpainting_a_double_canvas(pipe: PixArtReferencePipeline) -> None:
    red = pipe("a cat", reference_image=reference("red"), **OPTIONS).images[0]
    assert red.size == (SIZE_PX, SIZE_PX)
    tensor = pipe("a cat", reference_image=reference("red"), output_type="pt", **OPTIONS).images
    assert tensor.shape == (1, 3, SIZE_PX, SIZE_PX)
    array = pipe("a cat", reference_image=reference("red"), output_type="np", **OPTIONS).images
    assert np.abs(array[0] * 255 - np.asarray(red)).max() <= 1
    blue = pipe("a cat", reference_image=reference("blue"), **OPTIONS).images[0]
    assert np.abs(np.asarray(red, int) - np.asarray(blue, int)).max() > 0  # what stands on the left is seen


def test_guidance_does_not_show_the_reference_to_the_null_caption(pipe: PixArtReferencePipeline) -> None:
    seen, patches = [], pipe.transformer.x_embedder
    handle = patches.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    pipe("a cat", reference_image=reference("red"), **OPTIONS)
    handle.remove()
    null, conditional = seen[-1].chunk(2)
    half = null.shape[-1] // 2
    assert torch.equal(null[..., half:], conditional[..., half:])
    assert not torch.equal(null[..., :half], conditional[..., :half])


def test_what_the_canvas_leaves_no_room_for_is_refused(pipe: PixArtReferencePipeline) -> None:
    with pytest.raises(PromptError, match="strength cannot be given with a reference_image"):
        pipe("a cat", reference_image=reference("red"), strength=0.5)
    with pytest.raises(PromptError, match="is no PIL picture"):
        pipe("a cat", reference_image="cat.png")
    with pytest.raises(PromptError, match="output_type='latent'"):
        pipe("a cat", reference_image=reference("red"), output_type="latent")
