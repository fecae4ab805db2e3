"""Solvers for networks that predict flow or velocity, against processes whose answer is known."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion.errors import PromptError
from diffusion.inference.denoising import denoise, noised
from diffusion.inference.solvers import (
    FLOW_ALGORITHMS,
    fitting_scheduler,
    make_scheduler,
    predicts,
    scheduler_predicts,
    solver_name,
)
from diffusion.process import IDDPM

MEAN, STD = 0.7, 0.3


def noise() -> Tensor:
    return torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - x_0 | x_s] of rectified flow when x_0 is normal with MEAN and STD."""
    s = float(t) / 1000
    variance = (1 - s) ** 2 * STD**2 + s**2
    centred = x - (1 - s) * MEAN
    return s / variance * centred - (MEAN + (1 - s) * STD**2 / variance * centred)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_flow_solvers_reach_the_data(algorithm: str, shift: float) -> None:
    scheduler = make_scheduler(algorithm, prediction_type="flow", flow_shift=shift)
    sample = denoise(gaussian_velocity, scheduler, noise(), 50)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert sample.std().item() == pytest.approx(STD, abs=0.03)
    assert solver_name(scheduler) == algorithm


@pytest.mark.parametrize("algorithm", ["dpm-solver", "ddim", "deis", "sa-solver", "iddpm"])
def test_velocity_solvers_reach_the_data(algorithm: str) -> None:
    abar = IDDPM().alphas_cumprod

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        signal, sigma = abar[int(t)].sqrt().float(), (1 - abar[int(t)]).sqrt().float()
        variance = signal**2 * STD**2 + sigma**2
        x0 = MEAN + signal * STD**2 / variance * (x - signal * MEAN)
        return signal * (x - signal * x0) / sigma - sigma * x0

    sample = denoise(velocity, make_scheduler(algorithm, prediction_type="v_prediction"), noise(), 50)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert sample.std().item() == pytest.approx(STD, abs=0.05)


def test_a_scheduler_is_set_up_for_what_the_network_predicts() -> None:
    plain = make_scheduler("dpm-solver")
    assert fitting_scheduler(plain, "epsilon") is plain
    flow = fitting_scheduler(plain, "flow", 3.0)
    assert (predicts(flow.config), flow.config.flow_shift) == ("flow", 3.0)
    assert fitting_scheduler(flow, "flow") is flow
    assert predicts(make_scheduler("dpm-solver", base_config=flow.config).config) == "flow"
    assert fitting_scheduler(plain, "v_prediction").config.prediction_type == "v_prediction"
    euler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert fitting_scheduler(euler, "flow") is euler
    assert scheduler_predicts(fitting_scheduler(flow, "epsilon")) == "epsilon"
    assert scheduler_predicts(fitting_scheduler(make_scheduler("ddim", prediction_type="v_prediction"), "epsilon")) == (
        "epsilon"
    )
    with pytest.raises(PromptError, match="solver flow-euler samples flow models; this one predicts epsilon"):
        fitting_scheduler(euler, "epsilon")
    with pytest.raises(
        PromptError, match="solver iddpm cannot sample a flow model; choose one of dpm-solver, flow-euler"
    ):
        make_scheduler("iddpm", prediction_type="flow")
    with pytest.raises(PromptError, match="solver flow-euler samples flow models; this one predicts epsilon"):
        make_scheduler("flow-euler", prediction_type="epsilon")


def test_a_picture_under_noise_lies_on_the_straight_path() -> None:
    picture, drawn = torch.full((1, 4, 2, 2), 2.0), torch.ones(1, 4, 2, 2)
    for algorithm in FLOW_ALGORITHMS:
        scheduler = make_scheduler(algorithm, prediction_type="flow")
        assert noised(scheduler, picture, drawn, torch.tensor(250.0)).unique().item() == pytest.approx(1.75)
