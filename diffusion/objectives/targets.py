"""Other things to predict than the noise: velocity, and the direction of straight paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion.objectives.denoising import DenoisingObjective, LossOutput
from diffusion.process.flow import flow_sample, flow_velocity, keyed_sigmas


def prediction_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, one float32 value a sample: (B, C, H, W) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


@dataclass
class VelocityObjective(DenoisingObjective):
    """Velocity v = sqrt(abar) noise - sqrt(1 - abar) x_0 (arXiv:2202.00512, App. D), without learned variance.

    Min-SNR weight of v: min(snr, gamma) / (snr + 1) (arXiv:2303.09556, Sec. 3.4).
    """

    def terms(
        self, denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, timesteps: Tensor, noise: Tensor
    ) -> LossOutput:
        process = self.process
        output = denoise(process.q_sample(latents, timesteps, noise), process.original_timesteps(timesteps))
        mse = prediction_mse(output, process.velocity(latents, timesteps, noise))
        if self.min_snr_gamma is not None:
            snr = process.snr(timesteps)
            mse = mse * snr.clamp(max=self.min_snr_gamma) / (snr + 1)
        return LossOutput(mse.mean(), {"mse": mse.detach()})


@dataclass
class FlowObjective(DenoisingObjective):
    """Rectified flow: predict noise - x_0 at (1 - s) x_0 + s noise; the network is told 1000 s.

    Args:
        flow_shift: see `shift_sigma`.
    """

    flow_shift: float = 1.0

    def draw_timesteps(self, seed: int, numbers: Tensor) -> Tensor:
        """(B,) noise levels in [0, 1]."""
        return keyed_sigmas(seed, numbers, self.logit_normal, self.flow_shift)

    def terms(
        self, denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, timesteps: Tensor, noise: Tensor
    ) -> LossOutput:
        output = denoise(flow_sample(latents, timesteps, noise), 1000 * timesteps)
        mse = prediction_mse(output, flow_velocity(latents, noise))
        return LossOutput(mse.mean(), {"mse": mse.detach()})
