"""Picture <-> tensor, and the one resize of the project: cover the target, then cut the centre."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CropBox = tuple[float, float, float, float]


def crop_box_for(width: int, height: int, size: tuple[int, int]) -> CropBox:
    """The centred (left, top, right, bottom), in pixels of the source, with the aspect of `size` (height, width)."""
    target_height, target_width = size
    scale = max(target_height / height, target_width / width)
    crop_width = min(width, target_width / scale)
    crop_height = min(height, target_height / scale)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return (left, top, left + crop_width, top + crop_height)


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, CropBox]:
    """Scale to cover `size` = (height, width) and cut the centre, with antialiased bicubic interpolation.

    The aspect ratio of what is shown never changes. Returns the picture and the region of the source that it
    shows: (left, top, right, bottom) in source pixels.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size={size} must be positive")
    box = crop_box_for(image.width, image.height, size)
    if (image.height, image.width) == (height, width):
        return image, box
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box), box


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    if image.mode != "RGB":
        raise ValueError(f"mode {image.mode} is not RGB; decode pictures with decode_image")
    return to_unit_range(torch.from_numpy(np.array(image)))


def to_unit_range(pixels: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1], on their device."""
    return pixels.movedim(-1, -3).float().div_(127.5).sub_(1.0).contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clipped to that range -> RGB picture, rounded to the nearest of 256 levels."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)} are not (3, H, W)")
    levels = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
