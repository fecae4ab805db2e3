"""Rectified flow: straight paths from data to noise (arXiv:2209.03003; Stable Diffusion 3, arXiv:2403.03206)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.process.prediction import prediction_target, x0_and_noise
from diffusion.process.randomness import keyed_normal, keyed_uniform
from diffusion.process.timesteps import LogitNormal


class StraightPath:
    """Noise along straight lines, with the methods of `GaussianProcess` that objectives use.

    `timesteps` are (B,) float noise levels s in [0, 1], which the network is told as 1000 s.
    """

    def original_timesteps(self, timesteps: Tensor) -> Tensor:
        return 1000 * timesteps

    def q_sample(self, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_s = (1 - s) x_0 + s noise: x0, noise (B, C, H, W) -> (B, C, H, W)."""
        signal, sigma = _signal_and_noise(timesteps, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, timesteps: Tensor, noise: Tensor, kind: str = "flow") -> Tensor:
        """d x_s / d s = noise - x_0, constant along a path."""
        return prediction_target(kind, x0, noise, *_signal_and_noise(timesteps, x0))

    def x0_and_noise(
        self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, kind: str = "flow"
    ) -> tuple[Tensor, Tensor]:
        """The two ends of the path through x_t in the predicted direction, (B, C, H, W) each."""
        return x0_and_noise(kind, prediction, x_t, *_signal_and_noise(timesteps, x_t))


def _signal_and_noise(sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    s = sigma.view(-1, *[1] * (like.ndim - 1))
    return 1 - s, s


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
