"""The Gaussian noise process q and the learned reverse process p, as tensor functions over precomputed tables.

Equation numbers: DDPM (arXiv:2006.11239); learned-range variance: Improved DDPM (arXiv:2102.09672), Eq. 15.
Legend: B batch. `timesteps` are (B,) integer indices into this (possibly respaced) process.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion.process.prediction import prediction_target, x0_and_noise
from diffusion.process.schedules import make_betas, spaced_timesteps


class GaussianProcess:
    """Tables of one noise schedule, float64, and the formulas that read them.

    Args:
        betas: (T,) of the full process.
        kept: ascending original timesteps that this process visits; None = all.
    """

    def __init__(self, betas: Tensor, kept: list[int] | None = None) -> None:
        full_cumprod = torch.cumprod(1 - betas.double(), dim=0)
        self.timestep_map = torch.tensor(range(len(betas)) if kept is None else kept)
        self.alphas_cumprod = alpha_bar = full_cumprod[self.timestep_map]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        self.betas = 1 - alpha_bar / previous if kept is not None else betas.double()
        self.posterior_variance = self.betas * (1 - previous) / (1 - alpha_bar)  # Eq. 7
        # The posterior variance of the first step is 0; its logarithm borrows the second step's.
        borrowed = self.posterior_variance[1:2] if len(alpha_bar) > 1 else self.betas
        self.posterior_log_variance_clipped = torch.cat([borrowed, self.posterior_variance[1:]]).log()
        # Every factor is a float64 table: 1 - alpha_bar computed in float32 would lose four digits at t = 0.
        self._tables = {
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "posterior_mean_x0": previous.sqrt() * self.betas / (1 - alpha_bar),
            "posterior_mean_x_t": (1 - self.betas).sqrt() * (1 - previous) / (1 - alpha_bar),
            "posterior_variance": self.posterior_variance,
            "posterior_log_variance": self.posterior_log_variance_clipped,
            "log_beta": self.betas.log(),
            "fixed_large_log_variance": torch.cat([borrowed, self.betas[1:]]).log(),
            "snr": alpha_bar / (1 - alpha_bar),
            "timestep": self.timestep_map.double(),
        }
        self._moved: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def gather(self, table: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """Values of a named table as (B, 1, ..., 1) for broadcasting with `like`: float64 for float64, else float32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (timesteps.device, dtype)
        if key not in self._moved:  # moved once: a copy in every step would stall the device
            self._moved[key] = {name: values.to(*key) for name, values in self._tables.items()}
        return self._moved[key][table][timesteps].reshape(-1, *[1] * (like.ndim - 1))

    def original_timesteps(self, timesteps: Tensor) -> Tensor:
        """Indices of this process to the (B,) float timesteps that the network receives."""
        return self.gather("timestep", timesteps, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar), (B,) float32."""
        return self.gather("snr", timesteps, timesteps)

    def q_sample(self, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Sample q(x_t | x_0), Eq. 4: x0, noise (B, C, H, W) -> (B, C, H, W)."""
        signal, sigma = self._signal_and_noise(timesteps, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, timesteps: Tensor, noise: Tensor, kind: str) -> Tensor:
        """What a network of a kind ("epsilon", "v_prediction") shall predict at q_sample(x0, timesteps, noise)."""
        return prediction_target(kind, x0, noise, *self._signal_and_noise(timesteps, x0))

    def x0_and_noise(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """x_0 and noise that the prediction of a network of a kind implies, (B, C, H, W) each."""
        return x0_and_noise(kind, prediction, x_t, *self._signal_and_noise(timesteps, x_t))

    def predict_x0(self, x_t: Tensor, timesteps: Tensor, eps: Tensor) -> Tensor:
        """x_0 implied by a noise prediction (Eq. 4 solved for x_0)."""
        return self.x0_and_noise(eps, x_t, timesteps, "epsilon")[0]

    def predict_eps(self, x_t: Tensor, timesteps: Tensor, x0: Tensor) -> Tensor:
        """Noise implied by an x_0 prediction."""
        signal, sigma = self._signal_and_noise(timesteps, x_t)
        return (x_t - signal * x0) / sigma

    def q_posterior(self, x0: Tensor, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), Eq. 6-7."""
        mean = self.gather("posterior_mean_x0", timesteps, x_t) * x0
        mean = mean + self.gather("posterior_mean_x_t", timesteps, x_t) * x_t
        variance = self.gather("posterior_variance", timesteps, x_t)
        return mean, variance, self.gather("posterior_log_variance", timesteps, x_t)

    def learned_range_log_variance(self, v: Tensor, timesteps: Tensor) -> Tensor:
        """Interpolate between the two extreme log-variances; v in [-1, 1] covers the range (Improved DDPM, Eq. 15)."""
        low = self.gather("posterior_log_variance", timesteps, v)
        high = self.gather("log_beta", timesteps, v)
        fraction = (v + 1) / 2
        return fraction * high + (1 - fraction) * low

    def p_mean_log_variance(
        self, model_output: Tensor, x_t: Tensor, timesteps: Tensor, kind: str = "epsilon"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t), and the implied x_0.

        Args:
            model_output: (B, 2C, H, W) prediction and variance interpolation, or (B, C, H, W) prediction alone; then
                the variance is beta_t ("fixed large").
            x_t: (B, C, H, W). kind: of the prediction, "epsilon" or "v_prediction".
        """
        channels = x_t.shape[1]
        if model_output.shape[1] == 2 * channels:
            log_variance = self.learned_range_log_variance(model_output[:, channels:], timesteps)
        else:
            log_variance = self.gather("fixed_large_log_variance", timesteps, x_t).expand_as(x_t)
        x0, _ = self.x0_and_noise(model_output[:, :channels], x_t, timesteps, kind)
        mean, _, _ = self.q_posterior(x0, x_t, timesteps)
        return mean, log_variance, x0

    def _signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t)."""
        return (
            self.gather("sqrt_alpha_bar", timesteps, like),
            self.gather("sqrt_one_minus_alpha_bar", timesteps, like),
        )


def IDDPM(
    timestep_respacing: str | int | Iterable[int] | None = "",
    noise_schedule: str = "linear",
    diffusion_steps: int = 1000,
) -> GaussianProcess:
    """The process of PixArt: `diffusion_steps` of a schedule, respaced (see `spaced_timesteps`).

    The network always receives original timesteps: `process.timestep_map[index]`.
    """
    betas = make_betas(noise_schedule, diffusion_steps)
    kept = spaced_timesteps(diffusion_steps, timestep_respacing)
    return GaussianProcess(betas, None if len(kept) == diffusion_steps else kept)
