"""Rectified flow: straight paths from data to noise (arXiv:2209.03003; Stable Diffusion 3, arXiv:2403.03206)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.process.randomness import keyed_normal, keyed_uniform
from diffusion.process.timesteps import LogitNormal


def flow_sample(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s noise: x0, noise (B, C, H, W), sigma (B,) in [0, 1] -> (B, C, H, W)."""
    s = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0 + s * noise


def flow_velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """d x_s / d s = noise - x_0, what a flow model predicts; constant along a path."""
    return noise - x0


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels for larger pictures (arXiv:2403.03206, Eq. 23): s -> shift s / (1 + (shift - 1) s)."""
    return sigma if shift == 1 else shift * sigma / (1 + (shift - 1) * sigma)


def keyed_sigmas(
    seed: int, sample_numbers: Tensor, logit_normal: LogitNormal | None = None, shift: float = 1.0
) -> Tensor:
    """Noise levels in [0, 1], continuous: (B,) int64 sample numbers -> (B,) float32.

    Args:
        logit_normal: density before the shift; None = uniform.
    """
    if logit_normal is None:
        sigma = keyed_uniform(seed, "timestep", sample_numbers)
    else:
        normal = keyed_normal(seed, "timestep", sample_numbers, ())
        sigma = torch.sigmoid(logit_normal.mean + logit_normal.std * normal)
    return shift_sigma(sigma, shift)
