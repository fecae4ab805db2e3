from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from diffusion.errors import NumericalError, PromptError
from diffusion.inference import denoise, make_scheduler
from diffusion.inference.solvers import ALGORITHMS, solver_name, stock_scheduler
from diffusion.process import make_betas

MEAN, STD = 0.5, 0.7
LOG_ALPHA = 0.5 * torch.log(1 - make_betas("linear")).cumsum(0)  # (1000,), log sqrt(abar)


def exact_noise(x: Tensor, timestep: Tensor) -> Tensor:
    """The optimal noise prediction E[eps | x_t] for data N(MEAN, STD^2), in closed form."""
    log_alpha = np.interp(float(timestep), np.arange(1000), LOG_ALPHA.numpy())
    alpha_bar = float(np.exp(2 * log_alpha))
    return (1 - alpha_bar) ** 0.5 * (x - alpha_bar**0.5 * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)


def gaussian_noise(seed: int = 1) -> Tensor:
    return torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("algorithm", "steps", "std_tolerance"),
    # Few steps shrink or widen the distribution; the sampling error of 16,384 values is 0.005 for both moments.
    [
        ("dpm-solver", 20, 0.02),
        ("dpm-solver", 14, 0.05),
        ("sa-solver", 25, 0.04),
        ("ddim", 50, 0.04),
        ("iddpm", 100, 0.02),
    ],
)
def test_solvers_draw_the_data_distribution(algorithm: str, steps: int, std_tolerance: float) -> None:
    generators = [torch.Generator().manual_seed(5)]
    sample = denoise(exact_noise, make_scheduler(algorithm), gaussian_noise(), steps, generators=generators)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert sample.std().item() == pytest.approx(STD, abs=std_tolerance)


@pytest.mark.parametrize("algorithm", ["dpm-solver", "sa-solver", "ddim"])
def test_more_steps_come_closer(algorithm: str) -> None:
    def error(steps: int) -> float:
        generators = [torch.Generator().manual_seed(5)]
        sample = denoise(exact_noise, make_scheduler(algorithm), gaussian_noise(), steps, generators=generators)
        return abs(sample.std().item() - STD)

    assert error(100) < 0.6 * error(12)


def test_an_lcm_magnifies_rounding_so_that_it_wants_float16() -> None:
    """Why `choose_dtype(..., few_steps=True)` is float16: the first step divides by sqrt(alpha_bar_999) = 0.0064."""

    def error(dtype: torch.dtype, algorithm: str, steps: int) -> float:
        def rounded(x: Tensor, timestep: Tensor) -> Tensor:
            return exact_noise(x, timestep).to(dtype).float()

        def draw(predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            generators = [torch.Generator().manual_seed(5)]
            return denoise(predict, make_scheduler(algorithm), gaussian_noise(), steps, generators=generators)

        exact = draw(exact_noise)
        return ((draw(rounded) - exact).norm() / exact.norm()).item()

    assert error(torch.bfloat16, "lcm", 1) > 0.4 > 0.1 > error(torch.float16, "lcm", 1)
    assert error(torch.bfloat16, "lcm", 1) > 20 * error(torch.bfloat16, "dpm-solver", 20)


def original_dpm_solver(predict: object, x: Tensor, steps: int, *, first_order_end: bool) -> Tensor:
    """DPM-Solver++ 2M as the original runs it: uniform continuous time from 1 to 1/1000, data prediction, float64."""
    times = np.linspace(1.0, 1 / 1000, steps + 1)
    log_alpha = torch.from_numpy(np.interp(times, (np.arange(1000) + 1) / 1000, LOG_ALPHA.numpy()))
    alpha = log_alpha.exp()
    sigma = (1 - alpha**2).sqrt()
    lam = alpha.log() - sigma.log()
    previous = None
    for i in range(steps):
        data = (x - sigma[i] * predict(x, torch.tensor((times[i] - 1 / 1000) * 1000))) / alpha[i]  # type: ignore[operator]
        h = lam[i + 1] - lam[i]
        correction = torch.zeros_like(x)
        if previous is not None and not (i == steps - 1 and first_order_end):
            correction = (data - previous) / ((lam[i] - lam[i - 1]) / h)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * (data + 0.5 * correction)
        previous = data
    return x


@pytest.mark.parametrize("steps", [8, 14, 20])
def test_dpm_solver_agrees_with_the_published_formula(steps: int) -> None:
    expected = original_dpm_solver(exact_noise, gaussian_noise().double(), steps, first_order_end=True)
    actual = denoise(exact_noise, make_scheduler("dpm-solver"), gaussian_noise(), steps).double()
    # 0.01 of it: diffusers ends at noise level 0 and rounds its timesteps to integers.
    assert ((actual - expected).norm() / expected.norm()).item() < 0.015


def test_timesteps_are_the_originals() -> None:
    def timesteps(algorithm: str, steps: int) -> list[int]:
        scheduler = make_scheduler(algorithm)
        scheduler.set_timesteps(steps)
        return [int(t) for t in scheduler.timesteps]

    assert timesteps("lcm", 1) == [999]
    assert timesteps("lcm", 2) == [999, 499]
    assert timesteps("lcm", 4) == [999, 759, 519, 279]
    assert timesteps("lcm", 8) == [999, 879, 759, 639, 519, 399, 279, 159]
    for steps in (14, 20):
        continuous = [(i / steps) * 999 for i in range(steps, 0, -1)]  # 999, 949.05, 899.1, ... for 20
        assert timesteps("dpm-solver", steps) == [round(t) for t in continuous]
    iddpm = timesteps("iddpm", 100)
    assert (iddpm[0], iddpm[1], iddpm[-2], iddpm[-1]) == (999, 989, 10, 0)
    assert timesteps("ddim", 20)[0] == 999


def test_lcm_refuses_more_steps_than_it_was_distilled_for() -> None:
    with pytest.raises(PromptError, match="num_inference_steps=51 must be at most 50"):
        make_scheduler("lcm").set_timesteps(51)


def test_unknown_algorithm_names_the_nearest() -> None:
    with pytest.raises(PromptError, match="'dpm-solvr' is unknown; did you mean 'dpm-solver'"):
        make_scheduler("dpm-solvr")


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "ddpm"])
def test_base_config_keeps_the_noise_process(algorithm: str) -> None:
    base = DPMSolverMultistepScheduler(beta_start=0.001, beta_end=0.01, use_karras_sigmas=True).config
    scheduler = make_scheduler(algorithm, base_config=base)
    assert scheduler.betas[0].item() == pytest.approx(0.001)
    assert scheduler.betas[-1].item() == pytest.approx(0.01)
    assert not scheduler.config.get("use_karras_sigmas", False)
    assert solver_name(scheduler) == ("iddpm" if algorithm == "ddpm" else algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stock_scheduler_is_a_class_of_diffusers_with_the_same_process(algorithm: str) -> None:
    scheduler = make_scheduler(algorithm)
    stock = stock_scheduler(scheduler)
    assert type(stock).__module__.startswith("diffusers.schedulers")
    torch.testing.assert_close(stock.betas.double(), scheduler.betas.double(), rtol=1e-6, atol=0)


def test_a_network_that_fails_is_named() -> None:
    with pytest.raises(NumericalError, match="denoised latents are not finite"):
        denoise(lambda x, t: x * float("nan"), make_scheduler("dpm-solver"), gaussian_noise(), 2)


def test_on_step_may_replace_the_latents() -> None:
    seen: list[int] = []

    def on_step(index: int, timestep: Tensor, latents: Tensor) -> Tensor:
        seen.append(index)
        return torch.zeros_like(latents) if index == 3 else latents

    sample = denoise(exact_noise, make_scheduler("ddim"), gaussian_noise(), 4, on_step=on_step)
    assert seen == [0, 1, 2, 3]
    assert not sample.any()
