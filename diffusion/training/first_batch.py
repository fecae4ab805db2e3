"""Seeing is believing: the first batch of a run, decoded from the latents it trains on, with its captions."""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image

from diffusion.config import TrainConfig
from diffusion.data import AspectRatioBatchSampler, SampleKey
from diffusion.images import decode_latents, labelled_grid, load_vae, to_pil

_PICTURES = 8


def first_batch_sheet(
    config: TrainConfig, dataset: Any, sampler: AspectRatioBatchSampler, device: torch.device
) -> Image | None:
    """Pictures of the next global batch, at most eight, under the captions that will be drawn with them.

    Args:
        sampler: at the position where training goes on; it is not moved.
    Returns:
        The sheet; None without `pipeline_load_from`, whose VAE is needed.
    Raises:
        CheckpointError: the VAE cannot be loaded. DataError: the features of the batch cannot be read.
    """
    if config.pipeline_load_from is None:
        return None
    epoch, position = divmod(sampler.step, sampler.steps_per_epoch)
    start = sampler.step * sampler.global_batch
    indices = sampler.plan(epoch)[position][:_PICTURES]
    keys = [SampleKey(index, start + offset) for offset, index in enumerate(indices)]
    vae = load_vae(config.pipeline_load_from, device=device)
    pictures = []
    for key in keys:  # one by one: a sheet of 2048 px pictures shall not be what runs out of memory
        latents = dataset[key].latents_mean.float()[None] * vae.config.scaling_factor
        picture = to_pil(decode_latents(vae, latents)[0])
        picture.thumbnail((256, 256))
        pictures.append(picture)
    return labelled_grid(pictures, [dataset.caption_of(key) for key in keys], columns=4)
