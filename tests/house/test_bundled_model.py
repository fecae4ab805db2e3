"""The bundled model opens in stock diffusers and draws the same picture as our pipeline."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline

from diffusion.checkpoints import load_transformer
from diffusion.inference import PixArtPipeline
from diffusion.inference.recipe import model_fingerprint
from diffusion.web.examples import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "output/pretrained_models/emoji-256"


def test_stock_diffusers_draws_the_same_picture() -> None:
    stock = PixArtAlphaPipeline.from_pretrained(str(FOLDER), torch_dtype=torch.float32)
    ours = PixArtPipeline.from_pretrained(FOLDER)
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 4, "guidance_scale": ours.usual_guidance}  # stock's own is always 4.5
    theirs = stock("a red apple", **settings, generator=generator, clean_caption=False).images[0]
    mine = ours("a red apple", num_inference_steps=4, seed=3).images[0]
    assert mine.size == theirs.size == (256, 256)
    difference = np.abs(np.asarray(mine, int) - np.asarray(theirs, int))
    assert difference.max() <= 2
    assert np.asarray(mine).std() > 10


def test_the_examples_of_the_page_were_drawn_by_it() -> None:
    """The page shows pictures only where they are of the very weights; tools/draw_app_examples.py draws them anew."""
    drawn_by = json.loads((SHIPPED / "model.json").read_text())["model_fingerprint"]
    assert drawn_by == model_fingerprint(load_transformer(FOLDER / "transformer"))
    assert len(list(SHIPPED.glob("*.webp"))) == 8


def test_the_bundled_lcm_lora_draws_in_four_steps() -> None:
    """What distillation gave: drawings of 4 steps without it are smooth (benchmarks/results/finetune_lcm.json)."""
    pipeline = PixArtPipeline.from_pretrained(FOLDER, algorithm="lcm")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["red apple", "crown", "dog face", "police car"]

    def drawn() -> float:
        images = pipeline(prompts, num_inference_steps=4, guidance_scale=1.0, seed=[0, 1, 2, 3]).images
        grey = np.stack([np.asarray(image.convert("L"), float) for image in images])
        return float(np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean())

    without = drawn()
    pipeline.load_lora_weights(FOLDER.parent / "emoji-256-lcm-lora")
    assert drawn() > 1.1 * without


def test_size_limits() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 46e6
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = [(ROOT / name).stat().st_size for name in tracked.split("\0") if name and (ROOT / name).is_file()]
    assert len(sizes) > 3_000
    assert sum(sizes) <= 80 * 2**20


NASTY = [
    "",
    "🍎🚀",
    "ein roter Apfel",
    "红苹果",
    "\x00\x07\u202e\ud800",
    "<b>&amp;</b>",
    "a" * 10_000,
    "red apple " * 1_000,
]


def test_any_text_gives_a_picture_and_what_is_cut_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = PixArtPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(NASTY, num_inference_steps=2, seed=0, height=64, width=64).images
    assert [image.size for image in images] == [(64, 64)] * len(NASTY)
    assert all(np.asarray(image).std() > 1 for image in images)
    assert caplog.text.count("characters was cut at 2000; dropped: ") == 2
    assert "tokens; dropped: 'apple red apple" in caplog.text or "tokens; dropped: 'red apple" in caplog.text
