"""Terms of the variational bound (DDPM Eq. 5), in nats; one value an element, no reduction."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))), elementwise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2).square() * (-log_variance2).exp())


def normal_cdf(x: Tensor) -> Tensor:
    """Standard normal cumulative distribution in the tanh form, within 3e-4 of erf; PixArt was trained with it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, bin_half_width: float) -> Tensor:
    """Log-probability of the bin around x, elementwise; the outermost bins reach to infinity beyond |x| > 0.999.

    DDPM Eq. 13; for 8-bit pixels scaled to [-1, 1] bin_half_width is 1/255, and PixArt keeps that value for latents.
    """
    inverse_scale = (-log_scale).exp()
    above = normal_cdf((x - mean + bin_half_width) * inverse_scale)
    below = normal_cdf((x - mean - bin_half_width) * inverse_scale)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()
