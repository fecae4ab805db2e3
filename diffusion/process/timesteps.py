"""Which timestep of the noise process a training sample gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.randomness import keyed_normal, keyed_uniform


@dataclass(frozen=True)
class LogitNormal:
    """Logit-normal density of t / T: logit(t / T) ~ N(mean, std^2) (Stable Diffusion 3, arXiv:2403.03206, Sec. 3.1).

    The middle of the process is drawn most often; mean < 0 prefers little noise, mean > 0 much.
    """

    mean: float = 0.0
    std: float = 1.0


def keyed_timesteps(
    seed: int, sample_numbers: Tensor, num_timesteps: int, logit_normal: LogitNormal | None = None
) -> Tensor:
    """Indices floor(T u) in 0..T-1: (B,) int64 sample numbers -> (B,) int64.

    Args:
        num_timesteps: T.
        logit_normal: u = sigmoid(mean + std n), n standard normal; None = u uniform in [0, 1).
    """
    if logit_normal is None:
        position = keyed_uniform(seed, "timestep", sample_numbers)
    else:
        position = torch.sigmoid(
            logit_normal.mean + logit_normal.std * keyed_normal(seed, "timestep", sample_numbers, ())
        )
    # float32's sigmoid reaches 1.
    return (position * num_timesteps).long().clamp(max=num_timesteps - 1)
