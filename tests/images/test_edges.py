from __future__ import annotations

import torch

from diffusion.images import detect_edges
from tests.models.test_hed import random_hed


def test_edges_are_pictures_whatever_the_batch() -> None:
    network = random_hed()
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    edges = detect_edges(network, pixels)
    assert edges.shape == pixels.shape and edges.dtype == torch.float32
    torch.testing.assert_close(edges[:, :1], network((pixels + 1) / 2 * 255) * 2 - 1, atol=1e-4, rtol=1e-4)
    assert torch.equal(edges[:, 0], edges[:, 1]) and torch.equal(edges[:, 0], edges[:, 2])
    assert torch.equal(detect_edges(network, pixels[1:]), edges[1:])
    assert detect_edges(network.half(), pixels[:1, :, :16, :16]).dtype == torch.float32
