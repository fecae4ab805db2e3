"""What latents show, at almost no cost: one linear map from latent channels to colours."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusion.images import decode_latents, to_pil


class LatentPreview:
    """Pictures of one pixel a latent, without the VAE: (B, C, h, w) scaled latents -> B pictures of w x h px.

    The map is fitted once, by least squares, to what the VAE itself makes of smooth random latents; that takes the
    time of decoding one small picture.
    """

    def __init__(self, vae: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(4, vae.config.latent_channels, 3, 3, generator=generator)
        latents = F.interpolate(coarse, size=(12, 12), mode="bilinear", align_corners=True)
        generators = [torch.Generator().manual_seed(index) for index in range(len(latents))]
        pixels = decode_latents(vae, latents, generators=generators).cpu()
        colours = F.adaptive_avg_pool2d(pixels, (12, 12))  # (4, 3, 12, 12)
        self._matrix = torch.linalg.lstsq(_features(latents), colours.permute(0, 2, 3, 1).reshape(-1, 3)).solution

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Noise shows as noise: a preview clears up as the solver goes on."""
        latents = latents.detach().float().cpu()
        colours = (_features(latents) @ self._matrix).reshape(len(latents), *latents.shape[-2:], 3)
        return [to_pil(picture) for picture in colours.permute(0, 3, 1, 2)]


def _features(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B * h * w, C + 1), the last column 1."""
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
