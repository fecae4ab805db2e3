"""A style that the bundled model never saw: coloured pencil on brown paper, hatched and with dark outlines.

A picture is smoothed. Strokes at 45 degrees, in its colours, cover the more of the paper the further a colour is from
white, and outlines follow where a colour changes steeply. Nothing is random, so every picture has one drawing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion.evaluation.retrieval import to_pixels
from diffusion.images import to_pil

_PAPER, _OUTLINE = (200, 168, 122), (38, 22, 14)
_PERIOD = 16  # pixels along a row from stroke to stroke
_MOST_COVERED = 0.75


def pencil_drawing(image: Image.Image) -> Image.Image:
    """An RGB picture as a pencil drawing of the same size."""
    smooth = _smooth(to_pixels([image])[0], 5)
    drawn = _blend(_colour(_PAPER), smooth, _strokes(smooth))
    drawn = _blend(drawn, _colour(_OUTLINE), 0.9 * _outlines(smooth))
    return to_pil(drawn * 2 - 1)


def _strokes(pixels: Tensor) -> Tensor:
    """(3, H, W) -> (H, W) in 0..1: 1 on a stroke."""
    tone = ((1 - pixels.amin(0)) * 1.6).clamp(0, 1)
    down, across = torch.meshgrid(*map(torch.arange, tone.shape), indexing="ij")
    wave = 0.5 + 0.5 * torch.cos(2 * torch.pi * (down + across) / _PERIOD)
    return ((tone * _MOST_COVERED - wave) * 4 + 0.5).clamp(0, 1) * (tone > 0.1)


def _outlines(pixels: Tensor) -> Tensor:
    """(3, H, W) -> (H, W) in 0..1: 1 on edges of any colour channel."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    steep = (across.square() + down.square()).sqrt().amax(0, keepdim=True)
    return _smooth(((steep - 0.06) * 15).clamp(0, 1), 3)[0]


def _smooth(pixels: Tensor, size: int) -> Tensor:
    padded = F.pad(pixels, (size // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, size, stride=1)


def _colour(levels: tuple[int, int, int]) -> Tensor:
    return torch.tensor(levels)[:, None, None] / 255


def _blend(below: Tensor, above: Tensor, cover: Tensor) -> Tensor:
    return below + (above - below) * cover
