"""The bundled model opens in stock diffusers and draws the same picture as our pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtAlphaPipeline

from diffusion.inference import PixArtPipeline

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "output/pretrained_models/emoji-256"


def test_stock_diffusers_draws_the_same_picture() -> None:
    stock = PixArtAlphaPipeline.from_pretrained(str(FOLDER), torch_dtype=torch.float32)
    ours = PixArtPipeline.from_pretrained(FOLDER)
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = stock("a red apple", num_inference_steps=8, generator=generator, clean_caption=False).images[0]
    mine = ours("a red apple", num_inference_steps=8, seed=3).images[0]
    assert mine.size == theirs.size == (256, 256)
    difference = np.abs(np.asarray(mine, int) - np.asarray(theirs, int))
    assert difference.max() <= 2
    assert np.asarray(mine).std() > 10


def test_size_limits() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 46e6
