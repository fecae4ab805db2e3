"""A whole pipeline with tiny random networks, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion.checkpoints import save_transformer
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.models import PixArt
from tests.tiny import TINY_TEXT_CHANNELS, write_tiny_pipeline_parts

SIZE_PX = 64


def tiny_transformer(**overrides: object) -> PixArt:
    """2 blocks of width 48 for 64 px; its random weights make it answer to every input (a fresh model predicts 0)."""
    settings = {"hidden_size": 48, "num_heads": 4, "depth": 2, "input_size": SIZE_PX // 8, **overrides}
    model = PixArt(caption_channels=TINY_TEXT_CHANNELS, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.eval()


def write_tiny_pipeline(folder: Path, **overrides: object) -> Path:
    """A folder in the layout of diffusers; overrides: of the transformer's config."""
    write_tiny_pipeline_parts(folder)
    save_transformer(tiny_transformer(**overrides), folder / "transformer")
    make_scheduler("dpm-solver").save_pretrained(folder / "scheduler")
    return folder


def load_quietly(folder: Path, **options: object) -> PixArtPipeline:
    pipeline = PixArtPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
