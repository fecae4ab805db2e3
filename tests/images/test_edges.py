from __future__ import annotations

import torch

from diffusion.images import canny_edges, detect_edges
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


def test_canny_draws_one_line_around_a_shape() -> None:
    pixels = torch.full((2, 3, 32, 32), -1.0)
    pixels[0, :, 8:24, 8:24] = 1.0
    pixels[1] += 0.3 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))  # noise below the thresholds
    edges = canny_edges(pixels)
    assert edges.shape == pixels.shape and set(edges.unique().tolist()) == {-1.0, 1.0}
    lines = edges[0, 0] > 0
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[10:22, 10:22] = True
    near = torch.zeros(32, 32, dtype=torch.bool)
    near[7:25, 7:25] = True
    assert not lines[inside].any() and not lines[~near].any()
    assert 52 <= int(lines.sum()) <= 64  # a square of 16 px: one pixel wide
    assert lines[:, 16].sum() == 2 and lines[16].sum() == 2  # closed above, below, left and right
    assert not (edges[1] > 0).any()
    assert torch.equal(canny_edges(pixels[:1]), edges[:1])


def test_canny_keeps_a_weak_edge_that_touches_a_strong_one() -> None:
    ramp = torch.full((1, 3, 32, 32), -1.0)
    ramp[..., :16, 16:] = 0.0  # a strong vertical edge above, which weakens below
    ramp[..., 16:, 16:] = -1.0 + 2 * 35 / 255  # |dx| + |dy| = 140: between the thresholds
    lines = canny_edges(ramp)[0, 0] > 0
    assert lines[4, 15:17].any() and lines[26, 15:17].any()
    alone = ramp.clone()
    alone[..., :16, 16:] = -1.0 + 2 * 35 / 255
    assert not (canny_edges(alone)[0, 0] > 0).any()
