"""CLIP score on a tiny CLIP in the layout of the official folders, against a computation by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from diffusion.errors import CheckpointError, DataError
from diffusion.evaluation.clip_score import clip_report, clip_scores
from diffusion.inference import save_png

SIZE_PX = 32
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# One token a letter; the last letter of a word is another token.
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
START, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1
PROMPTS = ["red cat", "a very blue dog", "x"]


def write_tiny_clip(folder: Path) -> Path:
    """A CLIP of two layers a side with random weights: config, safetensors, vocab and merges, image processor."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(VOCABULARY), "bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    config = CLIPConfig(
        text_config={**small, **tokens, "max_position_embeddings": 16, "projection_dim": 16},
        vision_config={**small, "image_size": SIZE_PX, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    crop = {"height": SIZE_PX, "width": SIZE_PX}
    processor = {"size": {"shortest_edge": SIZE_PX}, "crop_size": crop, "image_mean": MEAN, "image_std": STD}
    files = {
        "vocab.json": json.dumps({token: index for index, token in enumerate(VOCABULARY)}),
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}),
        "preprocessor_config.json": json.dumps({"image_processor_type": "CLIPImageProcessor", **processor}),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(6, 4), (4, 6), (5, 5)]
    coarse = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return [image.resize((10 * image.width, 10 * image.height), Image.Resampling.BICUBIC) for image in coarse]


def cosine_by_hand(folder: Path, image: Image.Image, prompt: str) -> float:
    """From pixels and letters to the cosine of the two embeddings, without the processor."""
    scale = SIZE_PX / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE_PX) // 2, (image.height - SIZE_PX) // 2
    cropped = np.asarray(image.crop((left, top, left + SIZE_PX, top + SIZE_PX)))
    pixels = torch.tensor((cropped / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
    tokens = [token for word in prompt.split() for token in (*word[:-1], f"{word[-1]}</w>")]
    ids = torch.tensor([[START, *map(VOCABULARY.index, tokens), END]])
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        picture = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double().numpy()
        text = model.text_projection(model.text_model(ids).pooler_output)[0].double().numpy()
    return float(picture @ text / np.sqrt((picture @ picture) * (text @ text)))


def test_scores_are_cosines_in_percent(folder: Path, pictures: list[Image.Image]) -> None:
    expected = [100 * max(cosine_by_hand(folder, *pair), 0) for pair in zip(pictures, PROMPTS)]
    scores = clip_scores(pictures, PROMPTS, folder)
    assert max(expected) > 1
    assert scores.shape == (3,)
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_negative_cosines_count_as_zero(folder: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    opposite = write_tiny_clip(tmp_path / "opposite")
    tensors = load_file(opposite / "model.safetensors")
    tensors["text_projection.weight"] *= -1
    save_file(tensors, opposite / "model.safetensors", metadata={"format": "pt"})
    cosines = [cosine_by_hand(folder, *pair) for pair in zip(pictures, PROMPTS)]
    expected = [100 * max(-cosine, 0) for cosine in cosines]
    assert any(cosine > 0 for cosine in cosines)
    np.testing.assert_allclose(clip_scores(pictures, PROMPTS, opposite), expected, atol=1e-3)


def test_batches_and_padding_change_nothing(folder: Path, pictures: list[Image.Image]) -> None:
    together = clip_scores(pictures, PROMPTS, folder)
    torch.testing.assert_close(clip_scores(pictures, PROMPTS, folder, batch_size=2), together, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        clip_scores(pictures[::-1], PROMPTS[::-1], folder, batch_size=1), together.flip(0), rtol=0, atol=1e-4
    )
    assert clip_scores([], [], folder).shape == (0,)
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        clip_scores(pictures, ["x"], folder)


def test_long_prompts_are_cut(folder: Path, pictures: list[Image.Image]) -> None:
    long = "z" * 40
    cut = clip_scores(pictures[:1], [long], folder)
    assert torch.equal(cut, clip_scores(pictures[:1], ["z" * 30], folder))
    assert not torch.equal(cut, clip_scores(pictures[:1], ["z"], folder))


def test_report(folder: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    prompts = [*PROMPTS[:2], "q" * 15]  # 17 tokens with start and end; the model reads 16
    paths = [
        save_png(image, tmp_path / f"{index}.png", {"prompt": prompt, "seed": index, "steps": 20})
        for index, (image, prompt) in enumerate(zip(pictures, prompts))
    ]
    report = clip_report(paths, folder, batch_size=2)
    scores = clip_scores(pictures, prompts, folder).double().numpy()
    assert report["clip_score"] == pytest.approx(scores.mean(), rel=1e-5)
    assert report["standard_error"] == pytest.approx(scores.std(ddof=1) / 3**0.5, rel=1e-4)
    assert (report["num_pictures"], report["num_prompts_cut"]) == (3, 1)
    assert report["model"] == str(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert report["weights_sha256"] == {"model.safetensors": digest}
    assert report["sampling"] == {"steps": 20}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert clip_report(paths[:1], folder)["standard_error"] is None


def test_pictures_that_cannot_be_scored(folder: Path, tmp_path: Path) -> None:
    bare, sheet, damaged = tmp_path / "bare.png", tmp_path / "sheet.png", tmp_path / "damaged.png"
    Image.new("RGB", (8, 8)).save(bare)
    save_png(Image.new("RGB", (8, 8)), sheet, {"prompts": ["a", "b"]})
    damaged.write_bytes(b"not a picture")
    for path in (bare, sheet, damaged):
        with pytest.raises(DataError, match=path.name):
            clip_report([path], folder)
    with pytest.raises(DataError, match=f"^{damaged}: "):
        clip_scores([bare, damaged], ["a", "b"], folder)
    with pytest.raises(DataError, match="no pictures"):
        clip_report([], folder)


@pytest.mark.parametrize("name", ["output/no-such-folder", "/no/such/folder", "openai/no-such-clip"])
def test_a_missing_model_says_what_to_fetch(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{name}: .*`hf download .* --local-dir "):
        clip_scores([], [], name)


def test_incomplete_models_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_clip(tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, the first 'visual_projection\.weight'"):
        clip_scores([], [], folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        clip_scores([], [], folder)
