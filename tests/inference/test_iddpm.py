from __future__ import annotations

import pytest
import torch

from diffusion.errors import PromptError
from diffusion.inference import IDDPMScheduler


def test_step_equals_the_formula_in_float64() -> None:
    """Improved DDPM Eq. 15 and DDPM Eq. 7 written out for one respaced step, against the scheduler."""
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)  # 0, 111, ..., 888, 999
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 6, 6, generator=generator)
    eps = torch.randn(2, 4, 6, 6, generator=generator)
    v = torch.rand(2, 4, 6, 6, generator=generator) * 2 - 1
    timestep = 555
    previous = scheduler.step(
        torch.cat([eps, v], dim=1), timestep, sample, generator=[torch.Generator().manual_seed(s) for s in (7, 8)]
    ).prev_sample

    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    abar, abar_prev = alpha_bars[555], alpha_bars[444]
    beta = 1 - abar / abar_prev
    x0 = (sample.double() - (1 - abar).sqrt() * eps.double()) / abar.sqrt()
    mean = abar_prev.sqrt() * beta / (1 - abar) * x0
    mean = mean + (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar) * sample.double()
    low, high = (beta * (1 - abar_prev) / (1 - abar)).log(), beta.log()
    fraction = (v.double() + 1) / 2
    std = (0.5 * (fraction * high + (1 - fraction) * low)).exp()
    noise = torch.cat([torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(s)) for s in (7, 8)])
    torch.testing.assert_close(previous.double(), mean + std * noise.double(), rtol=1e-5, atol=1e-5)


def test_last_step_adds_no_noise_and_does_not_clip() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    sample = torch.full((1, 4, 2, 2), 9.0)  # far outside [-1, 1]
    output = scheduler.step(torch.zeros(1, 8, 2, 2), 0, sample)
    torch.testing.assert_close(output.prev_sample, output.pred_original_sample)
    assert output.prev_sample.min().item() > 9.0


def test_more_variance_channels_spread_more() -> None:
    def spread(v: float) -> float:
        scheduler = IDDPMScheduler()
        scheduler.set_timesteps(10)
        output = torch.cat([torch.zeros(1, 4, 32, 32), torch.full((1, 4, 32, 32), v)], dim=1)
        generator = torch.Generator().manual_seed(0)
        return scheduler.step(output, 111, torch.zeros(1, 4, 32, 32), generator=generator).prev_sample.std().item()

    assert spread(1.0) > 1.1 * spread(-1.0)


def test_one_step_cannot_hold_both_ends() -> None:
    with pytest.raises(PromptError, match="num_inference_steps=1 must be at least 2"):
        IDDPMScheduler().set_timesteps(1)


def test_other_predictions_are_refused() -> None:
    with pytest.raises(PromptError, match="needs prediction_type 'epsilon' or 'v_prediction', not 'sample'"):
        IDDPMScheduler(prediction_type="sample")
