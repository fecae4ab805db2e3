"""A style that the bundled model never saw: pictures redrawn as blueprints, light outlines on blue paper.

Pictures are smoothed; where a colour's gradient is steep, an outline is drawn, and nothing else is. Nothing is random,
so every picture has one drawing.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

_PAPER, _LINE = (24.0, 60.0, 130.0), (240.0, 246.0, 255.0)


def line_drawing(image: Image.Image) -> Image.Image:
    """An RGB picture as a blueprint of the same size."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 255
    lines = _outlines(_smooth(pixels, 5))
    paper, colour = torch.tensor(_PAPER), torch.tensor(_LINE)
    drawn = paper + lines[..., None] * (colour - paper)
    return Image.fromarray(drawn.round().to(torch.uint8).numpy())


def _outlines(pixels: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) -> (H, W) in 0..1: 1 on edges of any colour channel."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    steep = (across.square() + down.square()).sqrt().amax(1, keepdim=True)
    return _smooth(((steep - 0.06) * 15).clamp(0, 1), 3)[0, 0].clamp(0, 1)


def _smooth(pixels: torch.Tensor, size: int) -> torch.Tensor:
    padded = F.pad(pixels, (size // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, size, stride=1)
