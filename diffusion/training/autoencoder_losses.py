"""Losses of the small autoencoder. Legend: B pictures, C channels, H x W pixels in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_COLOUR_WINDOW = 8  # px
_DETAIL_WINDOW = 64  # px
_DETAIL_FLOOR = (2 / 255) ** 2  # below the noise of an 8-bit picture no detail is missed


def edge_loss(found: Tensor, wanted: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of horizontal and vertical gradients, averaged over `scales` halvings."""
    total = found.new_zeros(())
    for scale in range(scales):
        if scale:
            found, wanted = F.avg_pool2d(found, 2), F.avg_pool2d(wanted, 2)
        for axis in (2, 3):
            total = total + (found.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean()
    return total / (2 * scales)


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), mean over elements, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def colour_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean square difference of the colours of windows of 8 x 8 px.

    An absolute difference forgives a few objects that are painted wrongly; this term minds the largest errors most.
    """
    return F.avg_pool2d(found - wanted, _COLOUR_WINDOW).square().mean()


def detail_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of the log amplitude of fine detail in windows of 64 x 64 px.

    Pixel losses reward blurred edges wherever their place is uncertain; this term asks for the right amount of detail.
    The windows are large, since to sharpen all edges of a part of a picture alike costs the least in pixel error; small
    ones make the decoder invent texture. Fine detail is what a 3 x 3 binomial blur removes: the upper half of the
    spectrum.
    """
    window = min(_DETAIL_WINDOW, *found.shape[2:])
    amplitudes = []
    for pixels in (found, wanted):
        fine = pixels - _binomial_blur(pixels)
        energy = F.avg_pool2d(fine.square().mean(1, keepdim=True), window, stride=max(1, window // 2))
        amplitudes.append(0.5 * (energy + _DETAIL_FLOOR).log())
    return (amplitudes[0] - amplitudes[1]).abs().mean()


def _binomial_blur(pixels: Tensor) -> Tensor:
    """Blur with (1, 2, 1) / 4 each way: halves a wave of a quarter cycle a pixel, removes one of half a cycle."""
    channels = pixels.shape[1]
    line = pixels.new_tensor((0.25, 0.5, 0.25))
    kernel = torch.outer(line, line).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)
