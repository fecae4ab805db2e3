from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from PIL import Image

from diffusion.errors import CheckpointError, NumericalError, PromptError
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.inference.solvers import stock_scheduler
from tests.inference.tiny_pipeline import load_quietly, tiny_transformer, write_tiny_pipeline

PROMPT = "A red Apple on a table"


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def max_difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(levels(first) - levels(second)).max())


@pytest.fixture(scope="module")
def stock(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PixArtAlphaPipeline:
    """Stock diffusers on a folder that our pipeline saved."""
    saved = tmp_path_factory.mktemp("stock") / "saved"
    load_quietly(pipeline_folder).save_pretrained(saved)
    pipe = PixArtAlphaPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stock(stock: PixArtAlphaPipeline, seed: int, **arguments: Any) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    options = {"use_resolution_binning": False, "clean_caption": False, **arguments}
    return stock(PROMPT, generator=generator, **options).images[0]


@pytest.mark.parametrize(
    ("algorithm", "steps"), [("dpm-solver", 14), ("dpm-solver", 20), ("sa-solver", 25), ("ddim", 20), ("deis", 20)]
)
def test_same_picture_as_stock_diffusers(
    pipeline: PixArtPipeline, stock: PixArtAlphaPipeline, algorithm: str, steps: int
) -> None:
    pipeline.scheduler = make_scheduler(algorithm)
    stock.scheduler = stock_scheduler(make_scheduler(algorithm))
    arguments = {"num_inference_steps": steps, "height": 64, "width": 96}
    ours = pipeline(PROMPT, seed=3, **arguments).images[0]
    theirs = draw_stock(stock, 3, **arguments)
    assert ours.size == (96, 64)
    assert levels(ours).std() > 20  # a real picture, so that agreement means something
    assert max_difference(ours, theirs) <= 2
    assert max_difference(ours, pipeline(PROMPT, seed=4, **arguments).images[0]) > 20


@pytest.mark.parametrize(
    "options", [{"negative_prompt": "blue car near the house"}, {"guidance_scale": 1.0}, {"guidance_scale": 2.0}]
)
def test_guidance_agrees_with_stock_diffusers(
    pipeline: PixArtPipeline, stock: PixArtAlphaPipeline, options: dict[str, Any]
) -> None:
    stock.scheduler = stock_scheduler(pipeline.scheduler)
    arguments = {"num_inference_steps": 4, "height": 64, "width": 64, **options}
    ours = pipeline(PROMPT, seed=1, **arguments).images[0]
    assert max_difference(ours, draw_stock(stock, 1, **arguments)) <= 2
    assert max_difference(ours, pipeline(PROMPT, seed=1, num_inference_steps=4).images[0]) > 2


def test_size_conditions_agree_with_stock_diffusers(tmp_path: Path) -> None:
    """Stock passes size and ratio when sample_size is 128; a tiny VAE picture of 64x96 keeps that cheap."""
    pipe = load_quietly(write_tiny_pipeline(tmp_path / "ms", micro_condition=True, input_size=128))
    pipe.save_pretrained(tmp_path / "saved")
    stock = PixArtAlphaPipeline.from_pretrained(tmp_path / "saved")
    stock.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "height": 64, "width": 96}
    ours = pipe(PROMPT, seed=2, **arguments).images[0]
    assert max_difference(ours, draw_stock(stock, 2, **arguments)) <= 2


@pytest.mark.parametrize("algorithm", ["dpm-solver", "sa-solver", "iddpm", "lcm"])
def test_a_picture_is_the_same_in_any_batch(pipeline: PixArtPipeline, algorithm: str) -> None:
    prompts = ["a cat", "woman astronaut with medium skin tone and a very long caption, sea and sky", "tree"]
    pipeline.scheduler = make_scheduler(algorithm)
    together = pipeline(prompts, seed=10, num_inference_steps=4).images
    for index, prompt in enumerate(prompts):
        alone = pipeline(prompt, seed=10 + index, num_inference_steps=4).images[0]
        assert max_difference(alone, together[index]) <= 1
    assert max_difference(together[0], together[1]) > 5


def test_images_of_one_prompt_take_successive_seeds(pipeline: PixArtPipeline) -> None:
    output = pipeline(["a cat", "a dog"], num_images_per_prompt=2, seed=5, num_inference_steps=2)
    assert [(r["prompt"], r["seed"]) for r in output.recipes] == [
        ("a cat", 5),
        ("a cat", 6),
        ("a dog", 7),
        ("a dog", 8),
    ]
    alone = pipeline("a dog", seed=output.recipes[2]["seed"], num_inference_steps=2).images[0]
    assert max_difference(alone, output.images[2]) <= 1


def test_a_picture_without_seed_can_be_made_again(pipeline: PixArtPipeline) -> None:
    first = pipeline("a cat", num_inference_steps=2)
    again = pipeline("a cat", seed=first.recipes[0]["seed"], num_inference_steps=2)
    assert max_difference(first.images[0], again.images[0]) == 0
    assert pipeline("a cat", num_inference_steps=2).recipes[0]["seed"] != first.recipes[0]["seed"]


def test_a_generator_gives_the_picture_of_its_seed(pipeline: PixArtPipeline) -> None:
    by_seed = pipeline("a cat", seed=9, num_inference_steps=2).images[0]
    by_generator = pipeline("a cat", generator=torch.Generator().manual_seed(9), num_inference_steps=2)
    assert max_difference(by_seed, by_generator.images[0]) == 0
    assert by_generator.recipes[0]["seed"] is None


@pytest.mark.parametrize(("algorithm", "listens"), [("iddpm", True), ("dpm-solver", False)])
def test_only_iddpm_listens_to_the_variance_channels(pipeline_folder: Path, algorithm: str, listens: bool) -> None:
    pipe = load_quietly(pipeline_folder, algorithm=algorithm)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 5, "output_type": "latent"}
    before = pipe("a cat", **arguments).images
    with torch.no_grad():
        pipe.transformer.final_layer.linear.bias.view(4, 8)[:, 4:] += 1.0  # patch pixels x channels, channel fastest
    after = pipe("a cat", **arguments).images
    assert torch.equal(before, after) is not listens


def test_stored_null_caption(tmp_path: Path, pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(PromptError, match="needs a model with a stored null caption"):
        pipe("a cat", null_caption="stored", **arguments)
    generator = torch.Generator().manual_seed(3)
    stored = pipe.transformer.y_embedder.y_embedding
    stored.copy_(torch.randn(stored.shape, generator=generator))
    latents = pipe("a cat", null_caption="stored", **arguments).images
    assert not torch.allclose(latents, pipe("a cat", **arguments).images, rtol=1e-2)
    embeds, mask = pipe.encode_captions(["a cat"])
    by_hand = pipe(
        "a cat",
        negative_prompt_embeds=stored[None, : embeds.shape[1]],
        negative_prompt_attention_mask=mask,
        **arguments,
    ).images
    torch.testing.assert_close(latents, by_hand)
    pipe.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        load_quietly(tmp_path / "saved")("a cat", null_caption="stored", **arguments).images, latents
    )
    with pytest.raises(PromptError, match="negative_prompt replaces the null caption"):
        pipe("a cat", null_caption="stored", negative_prompt="dog", **arguments)


def test_embeddings_stand_for_prompts_without_a_text_encoder(pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    expected = pipe(["a cat", "a big dog"], seed=1, num_inference_steps=2).images
    embeds, mask = pipe.encode_captions(["a cat", "a big dog"])
    null_embeds, null_mask = pipe.encode_captions([""])
    pipe.text_encoder = None
    images = pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=null_embeds,
        negative_prompt_attention_mask=null_mask,
        seed=1,
        num_inference_steps=2,
    ).images
    assert all(max_difference(a, b) == 0 for a, b in zip(images, expected))


def test_output_types(pipeline: PixArtPipeline) -> None:
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 2}
    image = pipeline("a cat", **arguments).images[0]
    pixels = pipeline("a cat", output_type="pt", **arguments).images
    array = pipeline("a cat", output_type="np", **arguments).images
    latents = pipeline("a cat", output_type="latent", **arguments).images
    assert pixels.shape == (1, 3, 64, 64)
    assert array.shape == (1, 64, 64, 3)
    assert latents.shape == (1, 4, 8, 8)
    assert np.abs(array[0] * 255 - levels(image)).max() <= 0.51


def test_callback_sees_every_step_and_may_change_latents(pipeline: PixArtPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def callback(
        pipe: PixArtPipeline, step: int, timestep: int, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(state["latents"])} if step == 3 else state

    output = pipeline("a cat", seed=1, num_inference_steps=4, output_type="latent", callback_on_step_end=callback)
    assert seen == [(0, 999), (1, 749), (2, 500), (3, 250)]
    assert not output.images.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt=.. must be a text or a non-empty list"),
        ({"prompt": 3}, "prompt=3 must be a text"),
        ({"prompt": None}, "prompt=None: give prompt"),
        ({"height": 60}, "height=60 must be a positive multiple of 16 px"),
        ({"width": -16}, "width=-16 must be a positive multiple of 16 px"),
        ({"height": 0}, "height=0 must be"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer in 1..1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
        ({"guidance_scale": -1}, "guidance_scale=-1 must be"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be"),
        ({"null_caption": "t5"}, "null_caption='t5' is unknown"),
        ({"output_type": "pill"}, "output_type='pill' is unknown; did you mean 'pil'"),
        ({"seed": -1}, "seed=-1 must lie in"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
        ({"seed": [1, 2]}, "seed has 2 values for 1 pictures"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts for 1 prompts"),
        ({"prompt_embeds": torch.zeros(1, 2, 32)}, "prompt and prompt_embeds are both given"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 2, 32)}, "belong together"),
    ],
)
def test_requests_are_checked_before_any_work(
    pipeline: PixArtPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        pipeline(**{"prompt": "a cat", **arguments})


def test_weights_that_overflow_are_named(pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NumericalError, match="pictures decoded by the VAE are not finite"):
        pipe("a cat", seed=0, num_inference_steps=1)


def test_bfloat16_stays_near_float32(pipeline_folder: Path, pipeline: PixArtPipeline) -> None:
    half = load_quietly(pipeline_folder, torch_dtype=torch.bfloat16)
    assert half.vae.dtype == torch.float32
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 4, "output_type": "latent"}
    latents, expected = half("a cat", **arguments).images, pipeline("a cat", **arguments).images
    assert latents.dtype == torch.float32
    assert ((latents - expected).norm() / expected.norm()).item() < 0.1


def test_long_prompts_are_cut_with_a_notice(pipeline: PixArtPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipeline("cat " * 100_000, seed=0, num_inference_steps=1)
    assert "a prompt of 400000 characters was cut at 2000; dropped: 'cat cat" in caplog.text
    assert "a prompt was cut at 120 tokens; dropped: 't cat cat" in caplog.text  # this tokenizer has pieces of letters


def test_another_transformer_and_its_average(pipeline_folder: Path, tmp_path: Path) -> None:
    from diffusion.checkpoints import save_transformer

    network = tiny_transformer(depth=1)
    save_transformer(network, tmp_path / "checkpoint-5" / "transformer")
    with torch.no_grad():
        network.final_layer.linear.bias.fill_(1.0)
    save_transformer(network, tmp_path / "checkpoint-5" / "transformer_ema")
    plain = load_quietly(pipeline_folder, transformer=tmp_path / "checkpoint-5", algorithm="sa-solver")
    average = load_quietly(pipeline_folder, transformer=tmp_path / "checkpoint-5", ema=True)
    assert plain.transformer.config.depth == 1
    assert type(plain.scheduler).__name__ == "SASolverScheduler"
    assert average.transformer.final_layer.linear.bias.unique().tolist() == [1.0]
    assert plain.transformer.final_layer.linear.bias.unique().tolist() != [1.0]


def test_saved_folders_keep_what_they_replace(pipeline: PixArtPipeline, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="full exists; choose another folder"):
        pipeline.save_pretrained(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_saving_in_16_bits_leaves_the_pipeline_alone(pipeline: PixArtPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert {pipeline.vae.dtype, pipeline.text_encoder.dtype, pipeline.transformer.dtype} == {torch.float32}
    stock = PixArtAlphaPipeline.from_pretrained(tmp_path / "half").to(dtype=torch.float32)
    assert type(stock.scheduler).__name__ == "DPMSolverMultistepScheduler"
    original = sum(path.stat().st_size for path in (tmp_path / "half").rglob("*.safetensors"))
    pipeline.save_pretrained(tmp_path / "whole")
    assert original < 0.6 * sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*.safetensors"))


def test_missing_parts_are_named(tmp_path: Path, pipeline_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        PixArtPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="gone holds no transformer"):
        PixArtPipeline.from_pretrained(pipeline_folder, transformer=tmp_path / "gone")
