"""What latent consistency models add to the noise process (LCM, arXiv:2310.04378; consistency models, 2303.01469).

Legend: B batch. `timesteps` are (B,) integers of the full process, as in `GaussianProcess`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.flow import StraightPath, shift_sigma
from diffusion.process.gaussian import GaussianProcess

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0  # as diffusers' LCMScheduler, so that its boundary is the one trained here


def boundary_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of f(x, t) = c_skip x + c_out x0_hat, (B, 1, 1, 1) float32; f(x, 0) = x (LCM, Eq. 9).

    With s = 10 t: c_skip = sigma^2 / (s^2 + sigma^2), c_out = s / sqrt(s^2 + sigma^2), sigma = 0.5.
    """
    scaled = timesteps.float().view(-1, 1, 1, 1) * TIMESTEP_SCALING
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


@dataclass(frozen=True)
class DDIMGrid:
    """The steps on which a model is distilled: every k-th timestep, k = T / num_steps (LCM, Sec. 4.3).

    Index n = 0..num_steps-1 begins at t_n = (n + 1) k - 1 and ends at max(t_n - k, 0): 999 -> 979 ... 19 -> 0 for 50.

    Raises:
        ValueError: T is not divisible by num_steps.
    """

    path: GaussianProcess
    num_steps: int = 50

    def __post_init__(self) -> None:
        if self.path.num_timesteps % self.num_steps:
            raise ValueError(f"num_steps={self.num_steps} must divide the {self.path.num_timesteps} timesteps")

    def interval(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) indices -> timesteps at which the steps begin and end, (B,) int64 each."""
        stride = self.path.num_timesteps // self.num_steps
        begin = (indices + 1) * stride - 1
        return begin, (begin - stride).clamp(min=0)

    def step(self, x0: Tensor, noise: Tensor, end: Tensor) -> Tensor:
        """Deterministic DDIM step (arXiv:2010.02502, Eq. 12 with eta = 0) to `end`, from what a model implies."""
        return self.path.q_sample(x0, end, noise)

    def consistency(self, x_t: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
        """f(x_t, t) of a model that implies x0: (B, C, h, w) -> (B, C, h, w)."""
        c_skip, c_out = boundary_scalings(timesteps)
        return c_skip * x_t + c_out * x0


@dataclass(frozen=True)
class FlowGrid:
    """The same along straight paths: noise levels (n + 1) / num_steps -> n / num_steps, shifted as the model's.

    f(x, s) is the implied x_0 itself, as in diffusers' FlowMatchLCMScheduler: x - s v is x at s = 0 without scalings.
    A DDIM step is one of Euler here.
    """

    path: StraightPath
    num_steps: int = 50
    shift: float = 1.0

    def interval(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) indices -> noise levels at which the steps begin and end, (B,) float32 each."""
        begin, end = (shift_sigma((indices + more).float() / self.num_steps, self.shift) for more in (1, 0))
        return begin, end

    def step(self, x0: Tensor, noise: Tensor, end: Tensor) -> Tensor:
        """As `DDIMGrid.step`."""
        return self.path.q_sample(x0, end, noise)

    def consistency(self, x_t: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
        """As `DDIMGrid.consistency`."""
        return x0


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c, averaged over each sample: (B, ...) -> (B,) (arXiv:2310.14189, Sec. 3.3)."""
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(1)


def mean_square(difference: Tensor) -> Tensor:
    """d^2, averaged over each sample: (B, ...) -> (B,)."""
    return torch.square(difference).flatten(1).mean(1)
