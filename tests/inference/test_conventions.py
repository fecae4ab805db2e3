"""What users of diffusers' pipelines expect, and where the original's native behaviour differs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import ConsistencyDecoderVAE, PixArtAlphaPipeline
from PIL import Image

from diffusion.checkpoints import open_checkpoint
from diffusion.checkpoints.conversion import write_native
from diffusion.errors import CheckpointError, PromptError
from diffusion.images import decode_image, encode_moments, load_vae, resize_and_crop, to_tensor
from diffusion.inference import PixArtPipeline, guide, make_scheduler
from diffusion.inference.batch import load_pipeline
from diffusion.inference.previews import LatentPreview
from tests.inference.tiny_pipeline import load_quietly, tiny_transformer

ARGUMENTS: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"}
CAPTIONS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


def test_encode_prompt_gives_what_a_call_takes(pipeline: PixArtPipeline) -> None:
    encoded = pipeline.encode_prompt(["a cat", "a big dog"], negative_prompt="grey", num_images_per_prompt=2)
    assert encoded[0].shape[0] == encoded[3].shape[0] == 4
    drawn = pipeline(**dict(zip(CAPTIONS, encoded)), **ARGUMENTS).images
    expected = pipeline(["a cat", "a big dog"], negative_prompt="grey", num_images_per_prompt=2, **ARGUMENTS).images
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)[2:] == (None, None)


def test_encode_prompt_agrees_with_diffusers(pipeline: PixArtPipeline, pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    stock = PixArtAlphaPipeline.from_pretrained(tmp_path / "saved")
    theirs = stock.encode_prompt("A big Dog", device="cpu", clean_caption=False)
    for ours, other in zip(pipeline.encode_prompt("A big Dog"), theirs):
        kept = ours.shape[1]
        if ours.dtype == torch.bool:
            assert torch.equal(ours.long(), other[:, :kept].long()) and not other[:, kept:].any()
    for embeds, mask, other in ((0, 1, theirs[0]), (2, 3, theirs[2])):
        ours, kept = pipeline.encode_prompt("A big Dog")[embeds], pipeline.encode_prompt("A big Dog")[mask]
        torch.testing.assert_close(ours[kept], other[:, : kept.shape[1]][kept], rtol=1e-4, atol=1e-5)


def test_a_callback_can_interrupt(pipeline: PixArtPipeline) -> None:
    seen: list[torch.Tensor] = []

    def callback(pipe: PixArtPipeline, step: int, timestep: int, state: dict[str, torch.Tensor]) -> None:
        seen.append(state["latents"])
        pipe._interrupt = step == 1

    latents = pipeline("a cat", seed=1, num_inference_steps=6, output_type="latent", callback_on_step_end=callback)
    assert len(seen) == 2 and pipeline.interrupt
    assert torch.equal(latents.images, seen[1])
    assert latents.recipes[0]["interrupted"] is True  # this picture cannot be made again from its recipe
    assert "interrupted" not in pipeline("a cat", **ARGUMENTS).recipes[0]
    assert not pipeline.interrupt  # the next call starts anew


def test_latents_stand_for_noise_and_tuples_for_outputs(pipeline: PixArtPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    (images,) = pipeline("a cat", latents=noise, return_dict=False, **ARGUMENTS)
    assert torch.equal(images, pipeline("a cat", **ARGUMENTS).images)
    with pytest.raises(PromptError, match=r"latents of shape \(1, 4, 8, 4\) must be \(1, 4, 8, 8\)"):
        pipeline("a cat", latents=noise[..., :4], **ARGUMENTS)


def test_the_originals_guidance_leaves_the_fourth_channel(pipeline: PixArtPipeline) -> None:
    output = torch.tensor([[1.0] * 4 + [10.0] * 4, [3.0] * 4 + [20.0] * 4])[:, :, None, None]
    guided = guide(output, 4, 2.5, keep_variance=True, guided_channels=3)
    assert guided.flatten().tolist() == [6.0] * 3 + [3.0] + [20.0] * 4
    assert guide(output, 4, 2.5, keep_variance=False, guided_channels=3).flatten().tolist() == [6.0] * 3 + [3.0]
    three = pipeline("a cat", guidance_channels=3, **ARGUMENTS)
    assert three.recipes[0]["guidance_channels"] == 3
    assert not torch.allclose(three.images, pipeline("a cat", **ARGUMENTS).images)
    assert torch.equal(
        pipeline("a cat", guidance_channels=4, **ARGUMENTS).images, pipeline("a cat", **ARGUMENTS).images
    )
    with pytest.raises(PromptError, match="guidance_channels=5 must be an integer in 1..4"):
        pipeline("a cat", guidance_channels=5, **ARGUMENTS)


def test_native_files_use_the_stored_null_caption_by_default(pipeline_folder: Path) -> None:
    network = tiny_transformer()
    pipe = load_quietly(pipeline_folder, transformer=network)
    assert pipe.transformer is network
    as_diffusers = pipe("a cat", **ARGUMENTS)
    pipe.use_native_conventions()
    native = pipe("a cat", **ARGUMENTS)
    assert (as_diffusers.recipes[0]["null_caption"], native.recipes[0]["null_caption"]) == ("t5_empty", "stored")
    assert native.recipes[0]["clean_caption"] is True and pipe.clean_captions
    assert torch.equal(native.images, pipe("a cat", null_caption="stored", clean_caption=False, **ARGUMENTS).images)
    assert not torch.allclose(native.images, as_diffusers.images)
    with_negative = pipe("a cat", negative_prompt="grey", **ARGUMENTS)
    assert with_negative.recipes[0]["null_caption"] == "t5_empty"
    network.y_embedder.y_embedding.zero_()
    pipe.use_native_conventions()
    assert pipe.null_caption == "t5_empty"


def test_casting_to_float16_keeps_what_would_overflow(pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder).to(torch.float16)
    kinds = {name.rsplit(".", 2)[-2]: p.dtype for name, p in pipe.text_encoder.named_parameters() if "encoder" in name}
    assert kinds["wo"] == torch.float32 and kinds["wi_0"] == kinds["q"] == torch.float16
    assert pipe.transformer.dtype == torch.float16


def test_a_pipeline_of_other_folders(pipeline_folder: Path, tmp_path: Path) -> None:
    for name, parts in (("t5/t5-v1_1-xxl", ("tokenizer", "text_encoder")), ("ae", ("vae",)), ("net", ("transformer",))):
        (tmp_path / name).mkdir(parents=True)
        for part in parts:
            (tmp_path / name / part).symlink_to(pipeline_folder / part)
    options: dict[str, Any] = {"text_encoder": tmp_path / "t5", "vae": tmp_path / "ae/vae", "algorithm": "dpm-solver"}
    pipe = load_pipeline(tmp_path / "net", tmp_path / "gone", **options)
    pipe.set_progress_bar_config(disable=True)
    expected = load_quietly(pipeline_folder, algorithm="dpm-solver")("a cat", **ARGUMENTS).images
    assert torch.equal(pipe("a cat", **ARGUMENTS).images, expected)
    with pytest.raises(CheckpointError, match="gone is no folder; .*net needs tokenizer, T5 and VAE from it"):
        load_pipeline(tmp_path / "net", tmp_path / "gone")


def test_models_of_the_hub_come_from_its_cache(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models--someone--tiny"
    (model / "snapshots").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).symlink_to(pipeline_folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_quietly("someone/tiny").default_size == 64
    assert load_pipeline("someone/tiny", "nowhere").default_size == 64
    with pytest.raises(CheckpointError, match=r"someone/gone is no file .* could not be reached .*; fetch "):
        load_quietly("someone/gone")


@pytest.fixture(scope="module")
def consistency_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one with random weights, of the class that `openai/consistency-decoder` has."""
    folder = tmp_path_factory.mktemp("decoder") / "vae"
    torch.manual_seed(0)
    ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 8, 8, 8),
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    ).save_pretrained(folder)
    return folder


def test_consistency_decoder(
    pipeline_folder: Path, consistency_decoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert type(load_vae(consistency_decoder)).__name__ == "ConsistencyDecoderVAE"
    pipe = load_quietly(pipeline_folder, vae=consistency_decoder)
    pipe.set_memory_plan("4gb", "cpu")
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    together = pipe(["a cat", "a dog"], seed=4, **arguments).images
    assert together.shape == (2, 3, 64, 64)
    assert torch.equal(together, pipe(["a cat", "a dog"], seed=4, **arguments).images)
    # It draws noise when it decodes, from each picture's own generator.
    torch.testing.assert_close(pipe("a dog", seed=5, **arguments).images[0], together[1], rtol=1e-3, atol=1e-3)


def test_previews_show_what_the_vae_would() -> None:
    root = Path(__file__).parents[2]
    vae = load_vae(root / "output/pretrained_models/emoji-256")
    files = sorted((root / "data/emoji").rglob("*.webp"))[100:1700:400]
    pictures = [resize_and_crop(decode_image(file), (256, 256))[0] for file in files]
    pixels = torch.stack([to_tensor(picture) for picture in pictures])
    previews = LatentPreview(vae)(encode_moments(vae, pixels)[0] * vae.config.scaling_factor)
    agreement = []
    for preview, picture in zip(previews, pictures):
        assert preview.size == (32, 32)
        small = np.asarray(picture.resize((32, 32), Image.Resampling.BOX), float)
        agreement.append(np.corrcoef(np.asarray(preview, float).ravel(), small.ravel())[0, 1])
    assert np.mean(agreement) > 0.9  # the best linear map reaches 0.95 on these


def test_offload_of_diffusers_needs_only_its_order(pipeline: PixArtPipeline) -> None:
    """`enable_model_cpu_offload` moves the parts in this order; every part with weights has to be in it."""
    named = {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert pipeline.model_cpu_offload_seq.split("->") == ["text_encoder", "transformer", "vae"]
    assert set(pipeline.model_cpu_offload_seq.split("->")) == named


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_offload_of_diffusers_draws_the_same(pipeline_folder: Path) -> None:
    expected = load_quietly(pipeline_folder, device="cuda")("a cat", **ARGUMENTS).images
    pipe = load_quietly(pipeline_folder)
    pipe.enable_model_cpu_offload()
    assert torch.equal(pipe("a cat", **ARGUMENTS).images, expected)
    assert pipe.transformer.device.type == "cpu"


def test_lcm_and_deis_by_name(pipeline: PixArtPipeline) -> None:
    for algorithm, steps in (("lcm", 4), ("lcm", 8), ("deis", 20)):
        pipeline.scheduler = make_scheduler(algorithm)
        images = pipeline("a cat", seed=0, num_inference_steps=steps, guidance_scale=1.0, output_type="latent").images
        assert torch.isfinite(images).all()


def test_notices_are_logged_not_printed(pipeline: PixArtPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline("a cat", height=16, width=16, **ARGUMENTS)
    assert "16x16 px has 0.062 times the area that this model was trained on" in caplog.text


def test_a_native_file_draws_what_its_folder_draws(tmp_path: Path) -> None:
    """The bundled network in native names: recognised from its keys, and with the parts of a pipeline."""
    bundled = Path(__file__).parents[2] / "output/pretrained_models/emoji-256"
    native = write_native(open_checkpoint(bundled), tmp_path / "native.safetensors")
    pipe = load_pipeline(native, bundled)
    assert pipe.clean_captions  # the original's way with a native file
    pictures = [
        each("red apple", num_inference_steps=2, seed=0, output_type="pt").images
        for each in (pipe, PixArtPipeline.from_pretrained(bundled))
    ]
    assert torch.equal(*pictures)


def test_parts_of_different_models_are_refused(pipeline_folder: Path) -> None:
    bundled = Path(__file__).parents[2] / "output/pretrained_models/emoji-256"
    with pytest.raises(CheckpointError, match="captions of width 256, the T5 of .* gives .*--pipeline_load_from"):
        load_quietly(pipeline_folder, transformer=bundled)


def test_a_folder_names_its_usual_guidance(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    load_quietly(pipeline_folder).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())

    def scale_of(pipe: PixArtPipeline, **arguments: Any) -> float:
        return float(pipe.recipes(["a cat"], seed=[0], **arguments)[0]["guidance_scale"])

    assert scale_of(load_quietly(folder)) == 4.5
    (folder / "model_index.json").write_text(json.dumps(index | {"_guidance_scale": 2.5}))
    pipe = load_quietly(folder)
    assert scale_of(pipe) == 2.5 and scale_of(pipe, guidance_scale=6.0) == 6.0
    usual, given = (pipe("a cat", **ARGUMENTS, **scale).images for scale in ({}, {"guidance_scale": 2.5}))
    assert torch.equal(usual, given)
    pipe.save_pretrained(tmp_path / "saved")
    assert load_quietly(tmp_path / "saved").usual_guidance == 2.5
    PixArtAlphaPipeline.from_pretrained(tmp_path / "saved")  # stock diffusers passes over it
    assert scale_of(load_quietly(folder, transformer=pipe.transformer)) == 2.5  # a network trained on
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has the parts of a pipeline but no model_index\.json.*copy it from"):
        load_quietly(folder)
    for wrong in (-1, "3", True, None):
        (folder / "model_index.json").write_text(json.dumps(index | {"_guidance_scale": wrong}))
        with pytest.raises(CheckpointError, match=r"model_index\.json: _guidance_scale .* must be a number >= 0"):
            load_quietly(folder)
