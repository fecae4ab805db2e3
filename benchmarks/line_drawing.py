"""A style that the bundled model never saw: pictures redrawn with ink on paper, outlines and hatching.

Pictures are smoothed; where a colour's gradient is steep, an outline is drawn; darker than three levels, lines at 45,
135 and 0 degrees are added, 12 px apart. Nothing is random, so every picture has one drawing.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

_LEVELS = ((0.80, 45.0), (0.55, 135.0), (0.30, 0.0))
_PERIOD_PX, _LINE_PX = 12.0, 4.0
_PAPER, _INK = (250.0, 246.0, 236.0), (24.0, 28.0, 60.0)


def line_drawing(image: Image.Image) -> Image.Image:
    """An RGB picture as an ink drawing of the same size."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 255
    grey = _smooth((pixels * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True), 5)[0, 0]
    ink = _outlines(_smooth(pixels, 5))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grey.shape), indexing="ij")
    for level, degrees in _LEVELS:
        angle = torch.deg2rad(torch.tensor(degrees))
        across = (rows * angle.cos() + columns * angle.sin()).remainder(_PERIOD_PX)
        distance = torch.minimum(across, _PERIOD_PX - across)  # to the middle of the nearest line, px
        line = ((_LINE_PX / 2 + 0.5) - distance).clamp(0, 1)
        ink = torch.maximum(ink, line * ((level - grey) * 12).clamp(0, 1))
    paper, colour = torch.tensor(_PAPER), torch.tensor(_INK)
    drawn = paper + ink[..., None] * (colour - paper)
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
