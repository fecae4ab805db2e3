"""The stand-in encoder: it learns the concepts of pictures, and opens as any encoder does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusion.errors import CheckpointError
from diffusion.images.picture_encoder import load_picture_encoder
from diffusion.training.alignment_encoder import disturbed, train_alignment_encoder
from tests.training.tiny_run import ROOT


def test_it_learns_and_opens(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = {"batch_size": 16, "width": 64, "depth": 1, "image_size": 32, "patch_size": 8, "limit": 12}
    figures = train_alignment_encoder(ROOT / "data/emoji", tmp_path / "encoder", steps=120, **options)  # type: ignore[arg-type]
    assert figures["last_loss"] < 0.7 * figures["first_loss"]
    assert figures["train_accuracy"] > 0.5
    assert "a stand-in" in json.loads((tmp_path / "encoder/training.json").read_text())["note"]
    encoder = load_picture_encoder(tmp_path / "encoder")
    assert (encoder.patch_size, encoder.channels) == (8, 64)
    assert encoder(torch.zeros(2, 3, 64, 32), (8, 4)).shape == (2, 32, 64)
    with pytest.raises(CheckpointError, match="exists"):
        train_alignment_encoder(ROOT / "data/emoji", tmp_path / "encoder", steps=1, **options)  # type: ignore[arg-type]


def test_views_are_disturbed_and_repeat_with_their_seed() -> None:
    pictures = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, again = (disturbed(pictures, torch.Generator().manual_seed(1)) for _ in range(2))
    other = disturbed(pictures, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 1
    assert (first - other).abs().mean() > 0.05
    assert (first - pictures.float() / 255).abs().mean() > 0.05
