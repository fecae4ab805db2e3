"""Edges of pictures, which ControlNets follow. Legend: B pictures, H x W their size in px."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.models import HED

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@torch.no_grad()
def detect_edges(network: HED, pixels: Tensor) -> Tensor:
    """Edges as white lines on black: (B, 3, H, W) in [-1, 1] -> the same in float32, with three equal channels.

    One picture at a time: a picture then has the same edges in every batch, and the memory is that of one.

    Raises:
        ValueError: pictures below 16 px.
    """
    levels = pixels.to(device=network.device, dtype=network.dtype).add(1).mul(127.5)  # the network's 0..255
    edges = torch.cat([network(picture[None]) for picture in levels])  # (B, 1, H, W) in 0..1
    return edges.float().mul(2).sub(1).expand(-1, 3, -1, -1)


@torch.no_grad()
def canny_edges(pixels: Tensor, low: float = 100, high: float = 200) -> Tensor:
    """Canny's edges (1986), one pixel wide: (B, 3, H, W) in [-1, 1] -> -1 and 1 in float32, three equal channels.

    Sobel gradients of the luminance in 0..255, their length as |dx| + |dy|, the largest across the edge kept, and of
    those above `low` the ones connected to one above `high`; without blur, as ControlNets are commonly trained.
    """
    weights = pixels.new_tensor(_LUMINANCE, dtype=torch.float32).view(1, 3, 1, 1)
    grey = (pixels.float().add(1).mul(127.5) * weights).sum(1, keepdim=True)
    sobel = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    dx, dy = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).chunk(2, dim=1)
    length = dx.abs() + dy.abs()  # (B, 1, H, W)
    candidate = _largest_across(length, dx, dy) & (length > low)
    edges = candidate & (length > high)
    while True:  # hysteresis: grow into the weak candidates beside
        grown = candidate & (F.max_pool2d(edges.float(), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, edges):
            return edges.float().mul(2).sub(1).expand(-1, 3, -1, -1)
        edges = grown


def _largest_across(length: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Whether a gradient is the largest along its own direction, of four: (B, 1, H, W) bool."""
    height, width = length.shape[-2:]
    padded = F.pad(length, (1, 1, 1, 1))

    def neighbour(row: int, column: int) -> Tensor:
        return padded[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    flat, steep = 0.41421356, 2.41421356  # tangents of 22.5 and 67.5 degrees
    horizontal, vertical = dy.abs() <= flat * dx.abs(), dy.abs() >= steep * dx.abs()
    falling = dx * dy >= 0  # towards the lower right, as rows count downwards
    largest = torch.zeros_like(length, dtype=torch.bool)
    for chosen, row, column in (
        (horizontal, 0, 1),
        (vertical & ~horizontal, 1, 0),
        (~horizontal & ~vertical & falling, 1, 1),
        (~horizontal & ~vertical & ~falling, 1, -1),
    ):
        # Of two equal neighbours one stays, so that an edge between two pixels is one line.
        largest |= chosen & (length > neighbour(-row, -column)) & (length >= neighbour(row, column))
    return largest
