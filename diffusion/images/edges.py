"""Edges of pictures, which the published ControlNets follow. Legend: B pictures, H x W their size in px."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.models import HED


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
