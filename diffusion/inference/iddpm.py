"""Ancestral sampling with the learned variance (Improved DDPM, arXiv:2102.09672) as a diffusers scheduler.

diffusers' own DDPM scheduler lacks the original's respacing, so this one stands on `diffusion.process`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion.errors import PromptError
from diffusion.process import GaussianProcess, make_betas, spaced_timesteps


@dataclass
class IDDPMOutput(BaseOutput):
    """prev_sample: x_{t-1}; pred_original_sample: the implied x_0. Both (B, C, h, w)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class IDDPMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Ancestral sampler over a respaced process; it reads the variance channels and clips nothing.

    Args:
        num_train_timesteps: T of the full process.
        beta_start, beta_end: ends of a "linear" beta_schedule; "squaredcos_cap_v2" has none.
        prediction_type: "epsilon" or "v_prediction".
    Raises:
        PromptError: another prediction_type. ConfigError: another beta_schedule.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise PromptError(
                f"solver iddpm needs prediction_type 'epsilon' or 'v_prediction', not {prediction_type!r}; use "
                "dpm-solver"
            )
        if beta_schedule == "linear":
            self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        else:
            self.betas = make_betas(beta_schedule, num_train_timesteps)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Keep `num_inference_steps` evenly spaced timesteps, the first and the last of the full process included.

        Raises:
            PromptError: fewer than 2 steps, which cannot include both.
        """
        if num_inference_steps < 2:
            raise PromptError(f"num_inference_steps={num_inference_steps} must be at least 2 with solver iddpm")
        kept = spaced_timesteps(len(self.betas), num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.process = GaussianProcess(self.betas, kept if len(kept) < len(self.betas) else None)
        self.timesteps = torch.tensor(kept[::-1], device=device)
        self._step_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this position of `timesteps`, so that no step has to look its timestep up."""
        self._step_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """This process needs no scaling."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> IDDPMOutput | tuple[Tensor, Tensor]:
        """One draw from p(x_{t-1} | x_t); the last step returns its mean.

        Args:
            model_output: (B, 2C, h, w) prediction and variance interpolation, or (B, C, h, w): then variance beta_t.
            timestep: original timestep, a member of `timesteps`.
            sample: (B, C, h, w) x_t.
            generator: one, or one a picture.
        """
        if self._step_index is None:
            self._step_index = self.timesteps.tolist().index(int(timestep))
        index = len(self.timesteps) - 1 - self._step_index  # position in the ascending process
        positions = torch.full((len(sample),), index, device=sample.device)
        mean, log_variance, x0 = self.process.p_mean_log_variance(
            model_output, sample, positions, self.config["prediction_type"]
        )
        previous = mean
        if index > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            previous = mean + (0.5 * log_variance).exp() * noise
        self._step_index += 1
        return IDDPMOutput(previous, x0) if return_dict else (previous, x0)
