"""What a call has drawn, on its way to pictures. Legend: B pictures, C latent channels, h x w latent size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.images import crop_box_for, resize_and_crop, to_pil
from diffusion.inference.denoising import DENOISED, EMBEDDED, require_finite
from diffusion.inference.editing import Source
from diffusion.inference.requests import SamplingRequest


@dataclass
class Drawn:
    """latents: (B, C, h, w) scaled. pixels: (B, 3, H, W) in [-1, 1], once they are decoded. embeds: of the captions."""

    request: SamplingRequest
    embeds: Tensor
    latents: Tensor
    recipes: list[dict[str, Any]]
    generators: list[torch.Generator]
    source: Source | None
    pixels: Tensor | None = None

    def require_finite(self) -> None:
        """Look at what led to the pictures, the earliest stage first. Raises NumericalError."""
        require_finite(self.embeds, EMBEDDED)
        require_finite(self.latents, DENOISED)

    def pictures(self, pixels: Tensor) -> Any:
        """(B, 3, H, W) as `output_type` says. Raises NumericalError."""
        request = self.request
        require_finite(pixels, "the pictures decoded by the VAE")
        if self.source is not None:
            pixels = self.source.hold_pixels(pixels)
        size = (request.height, request.width)
        if request.output_type == "pil":
            return [resize_and_crop(to_pil(picture), size)[0] for picture in pixels]
        if pixels.shape[-2:] != size:
            pixels = _resized(pixels, size)
        if request.output_type == "pt":
            return pixels
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) scaled to cover `size` and cut in the centre, as `resize_and_crop` does with pictures."""
    left, top, right, bottom = (round(edge) for edge in crop_box_for(pixels.shape[-1], pixels.shape[-2], size))
    cut = pixels[:, :, top:bottom, left:right]
    return F.interpolate(cut, size=size, mode="bicubic", antialias=True, align_corners=False)
