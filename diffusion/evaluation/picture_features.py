"""What two pictures are compared by: plain colour, and the layout of edges. Legend: N pictures, H x W pixels.

Nothing here is learned, so no model is judged by features it was trained with, and the figures of two models, or of two
years, can be compared. Pixels are (N, 3, H, W) float32 in [0, 1]; H and W are multiples of 128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

COLOUR_SIDE = 32
EDGE_SIDE = 128
EDGE_CELL = 8
EDGE_DIRECTIONS = 8
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def luminance(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    return (pixels * pixels.new_tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)


def colour_features(pixels: Tensor) -> Tensor:
    """RGB averaged down to 32 x 32: (N, 3072)."""
    return F.adaptive_avg_pool2d(pixels, COLOUR_SIDE).flatten(1)


def edge_features(pixels: Tensor) -> Tensor:
    """Histograms of edge directions (HOG, Dalal & Triggs 2005) of the luminance at 128 x 128: (N, 2048).

    16 x 16 cells of 8 px with 8 unsigned directions each, weighted by the gradient's length and shared linearly between
    neighbouring directions; the root of the length relative to that of the 3 x 3 cells around, so that a faint edge
    counts like a strong one.
    """
    grey = F.pad(F.adaptive_avg_pool2d(luminance(pixels), EDGE_SIDE), (1, 1, 1, 1), mode="replicate")
    horizontal = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]  # (N, 1, 128, 128)
    vertical = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    length = (horizontal.square() + vertical.square()).sqrt()
    direction = torch.atan2(vertical, horizontal).remainder(math.pi) * (EDGE_DIRECTIONS / math.pi)  # 0..8
    bins = torch.arange(EDGE_DIRECTIONS, device=pixels.device).view(1, -1, 1, 1)
    distance = (direction - bins).remainder(EDGE_DIRECTIONS)
    share = (1 - torch.minimum(distance, EDGE_DIRECTIONS - distance)).clamp(min=0)  # (N, 8, 128, 128)
    cells = F.avg_pool2d(share * length, EDGE_CELL)  # (N, 8, 16, 16)
    around = F.avg_pool2d(cells.sum(1, keepdim=True), 3, stride=1, padding=1)
    return (cells / (around + 0.02)).sqrt().flatten(1)


def fine_detail_energy(pixels: Tensor) -> Tensor:
    """Spectral energy of the luminance at or above half the Nyquist frequency (0.25 cycles a pixel): (N,).

    Compared with that of a real picture it says whether a drawing is blurred (below 1) or noisy (above 1).
    """
    grey = luminance(pixels)[:, 0]
    power = torch.fft.fft2(grey).abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=pixels.device) for side in grey.shape[1:])
    radius = (rows[:, None].square() + columns[None, :].square()).sqrt()
    return (power * (radius >= 0.25)).mean((1, 2))
