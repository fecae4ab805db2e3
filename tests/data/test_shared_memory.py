"""A batch that a worker handed over gives its pages back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from diffusion.data import TrainSample, collate
from diffusion.data.shared_memory import discard


def shared_kilobytes() -> int:
    """Of this process, resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssShmem"))


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_pages_of_a_workers_batch_are_given_back() -> None:
    latents = torch.zeros(4, 2, 2)
    samples = [
        TrainSample(latents, latents, torch.randn(300, 4096), (16, 16), 1.0, number, f"{number}") for number in range(2)
    ]
    (batch,) = DataLoader(samples, batch_size=2, num_workers=1, collate_fn=collate)  # type: ignore[arg-type]
    embeds, mask = batch.caption_embeds, batch.caption_mask
    assert embeds.is_shared() and mask.is_shared()
    assert embeds.float().square().mean() > 0.5
    before = shared_kilobytes()
    discard(embeds)
    assert before - shared_kilobytes() > 0.95 * embeds.nbytes / 1024
    inside = embeds.flatten()[4096:-4096]
    assert not inside.any()
    discard(mask)  # small: freed with the batch
    assert mask.all()


def test_memory_of_this_process_is_left_alone() -> None:
    own = torch.ones(2**20)
    discard(own)
    transposed = torch.ones(2, 2**20).share_memory_().t()
    discard(transposed)
    assert own.all() and transposed.all()
