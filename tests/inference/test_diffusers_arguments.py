"""The arguments that users of diffusers give: parts left out or given, variants, generators, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import load_file, save_file

from diffusion.checkpoints import open_checkpoint
from diffusion.checkpoints.conversion import write_native
from diffusion.errors import CheckpointError, PromptError
from diffusion.inference import PixArtPipeline
from diffusion.inference.batch import load_pipeline
from tests.inference.tiny_pipeline import SIZE_PX, load_quietly, write_tiny_pipeline

BUNDLED = Path(__file__).parents[2] / "output/pretrained_models/emoji-256"
ARGUMENTS: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"}
CAPTIONS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


def test_t5_and_the_rest_can_be_loaded_one_after_the_other(pipeline_folder: Path) -> None:
    expected = load_quietly(pipeline_folder)("a cat", **ARGUMENTS).images
    encoding = load_quietly(pipeline_folder, transformer=None, vae=None)
    captions = dict(zip(CAPTIONS, encoding.encode_prompt("a cat")))
    drawing = load_quietly(pipeline_folder, text_encoder=None, vae=None)
    assert drawing.text_encoder is None and drawing.tokenizer is not None
    torch.testing.assert_close(drawing(**captions, **ARGUMENTS).images, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(PromptError, match="no transformer and encodes prompts alone"):
        encoding("a cat", **ARGUMENTS)
    with pytest.raises(PromptError, match="no text encoder; give prompt_embeds"):
        drawing("a cat", **ARGUMENTS)
    with pytest.raises(PromptError, match="no VAE; ask for output_type='latent'"):
        drawing(**captions, **{**ARGUMENTS, "output_type": "pil"})
    with pytest.raises(PromptError, match="of which this pipeline lacks one"):
        drawing.set_memory_plan("auto", "cpu")
    with pytest.raises(CheckpointError, match="cannot be saved without its text_encoder"):
        drawing.save_pretrained(pipeline_folder.parent / "never")


def test_parts_may_be_modules(pipeline_folder: Path) -> None:
    other = load_quietly(pipeline_folder, algorithm="ddim")
    given = {"text_encoder": other.text_encoder, "vae": other.vae, "scheduler": other.scheduler}
    pipe = load_quietly(pipeline_folder, **given)
    assert pipe.vae is other.vae and pipe.text_encoder is other.text_encoder
    settings = {**ARGUMENTS, "output_type": "pt"}
    assert torch.equal(pipe("a cat", **settings).images, other("a cat", **settings).images)
    with pytest.raises(PromptError, match="scheduler and algorithm are both given"):
        load_quietly(pipeline_folder, scheduler=other.scheduler, algorithm="ddim")


def test_variants_are_opened_part_by_part(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "variants"
    shutil.copytree(pipeline_folder, folder)
    for path in (folder / "transformer/diffusion_pytorch_model", folder / "text_encoder/model"):
        halves = {name: tensor.half() for name, tensor in load_file(f"{path}.safetensors").items()}
        save_file(halves, f"{path}.fp16.safetensors", {"format": "pt"})
        Path(f"{path}.safetensors").unlink()
    found = load_quietly(folder, variant="fp16", use_safetensors=True)("a cat", **ARGUMENTS).images
    torch.testing.assert_close(found, load_quietly(pipeline_folder)("a cat", **ARGUMENTS).images, rtol=0.05, atol=0.05)
    with pytest.raises(CheckpointError, match="text_encoder"):
        load_quietly(folder)
    with pytest.raises(CheckpointError, match="no weights of variant 'fp8'; leave variant out"):
        load_quietly(folder, variant="fp8")


def test_safetensors_alone_can_be_asked_for(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(pipeline_folder, folder)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert load_quietly(folder).vae is not None
    with pytest.raises(CheckpointError, match=r"vae has diffusion_pytorch_model\.bin, and use_safetensors=True asks"):
        load_quietly(folder, use_safetensors=True)


def test_one_generator_draws_the_noise_of_all_as_in_diffusers(pipeline_folder: Path, tmp_path: Path) -> None:
    load_quietly(pipeline_folder).save_pretrained(tmp_path / "saved")
    stock = PixArtAlphaPipeline.from_pretrained(tmp_path / "saved")
    stock.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "num_images_per_prompt": 3}
    sizes = {"height": SIZE_PX, "width": SIZE_PX, "use_resolution_binning": False}
    theirs = stock("a cat", **settings, **sizes, clean_caption=False, generator=torch.Generator().manual_seed(7)).images
    pipe = load_quietly(pipeline_folder)
    ours = pipe("a cat", **settings, generator=torch.Generator().manual_seed(7)).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert not torch.equal(ours[0], ours[1])


def test_stock_diffusers_needs_no_dtype_for_weights_in_half_precision(pipeline_folder: Path, tmp_path: Path) -> None:
    load_quietly(pipeline_folder).save_pretrained(tmp_path / "saved", torch.float16)
    assert load_file(tmp_path / "saved/text_encoder/model.safetensors")["shared.weight"].dtype == torch.float16
    load_quietly(BUNDLED).save_pretrained(tmp_path / "bundled", torch.float16)
    vocabularies = [folder / "tokenizer/spiece.model" for folder in (tmp_path / "bundled", BUNDLED)]
    assert vocabularies[0].read_bytes() == vocabularies[1].read_bytes()
    for folder in (tmp_path / "saved", tmp_path / "bundled", BUNDLED):
        stock = PixArtAlphaPipeline.from_pretrained(folder)
        stock.set_progress_bar_config(disable=True)
        size = {"height": stock.transformer.config.sample_size * 8, "width": stock.transformer.config.sample_size * 8}
        options: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False, "output_type": "np"}
        assert stock("a cat", num_inference_steps=2, **size, **options).images.shape[1] == size["height"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": 5}, "generator=5 must be a torch.Generator or a list of them"),
        ({"generator": []}, "generator has 0 entries for 1 pictures"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, "prompt_embeds; only latents change"),
    ],
)
def test_wrong_arguments_of_a_call(pipeline: PixArtPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        pipeline("a cat", num_inference_steps=2, output_type="latent", **arguments)


def test_wrong_arguments_of_loading_and_saving(pipeline: PixArtPipeline, pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="torch_dtype='float16' must be a dtype of torch"):
        load_quietly(pipeline_folder, torch_dtype="float16")
    with pytest.raises(CheckpointError, match="pickled weights are not written"):
        pipeline.save_pretrained(tmp_path / "a", safe_serialization=False)
    pipeline.save_pretrained(tmp_path / "b", safe_serialization=True)
    embeds, mask = pipeline.encode_captions(["a cat"])
    with pytest.raises(
        PromptError, match=r"prompt_embeds have 8 channels, the transformer reads \d+; encode with its T5"
    ):
        pipeline(prompt_embeds=embeds[..., :8], prompt_attention_mask=mask)


def test_a_file_that_tells_no_size_is_given_one(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "tiny", hidden_size=256, depth=10)
    native = write_native(open_checkpoint(folder), tmp_path / "native.safetensors")
    tensors = {name: tensor for name, tensor in load_file(native).items() if name != "pos_embed"}
    torch.save({"state_dict": tensors}, tmp_path / "untold.pth")
    expected = load_pipeline(native, folder)("a cat", **ARGUMENTS).images
    pipe = load_pipeline(tmp_path / "untold.pth", folder, image_size=SIZE_PX)
    assert pipe.default_size == SIZE_PX
    torch.testing.assert_close(pipe("a cat", **ARGUMENTS).images, expected, rtol=1e-4, atol=1e-4)
    told = load_pipeline(native, folder, image_size=2 * SIZE_PX)  # drawn larger than it was trained for
    assert told.default_size == SIZE_PX
    with pytest.raises(CheckpointError, match="give image_size"):
        load_pipeline(tmp_path / "untold.pth", folder)
