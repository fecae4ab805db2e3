"""Every objective takes a network of every kind: velocity gives what the same network in terms of noise gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion.models import ControlPixArt
from diffusion.objectives import (
    ConsistencyObjective,
    ControlObjective,
    DenoisingObjective,
    OneStepNetworks,
    Roles,
    prediction_mse,
)
from diffusion.process import IDDPM, StraightPath, keyed_normal, keyed_timesteps
from tests.objectives.test_consistency import make_network, objective
from tests.objectives.test_denoising import make_batch
from tests.objectives.test_distribution import parts
from tests.velocity_twin import velocity_twin

CLOSE = {"rtol": 2e-3, "atol": 1e-5}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_target_implies_the_picture_and_the_noise(kind: str) -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    path, t = IDDPM(""), torch.tensor([0, 400, 999])
    if kind == "flow":
        path, t = StraightPath(), torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    x_t = path.q_sample(x0, t, noise)
    found = path.x0_and_noise(path.target(x0, t, noise, kind), x_t, t, kind)
    torch.testing.assert_close(found, (x0, noise), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="'sample' must be epsilon, v_prediction or flow"):
        path.target(x0, t, noise, "sample")


def test_denoising_of_velocity_is_that_of_noise() -> None:
    """Min-SNR weights make the two losses one, and the learned variance has the same bound."""
    network, batch = make_network(0), make_batch(6)
    options = {"class_dropout_prob": 0.5, "null_embeds": torch.randn(2, 24), "min_snr_gamma": 5.0}
    of_noise = DenoisingObjective(IDDPM(""), 0.5, **options)
    of_velocity = replace(of_noise, prediction_type="v_prediction")
    expected, found = of_noise.loss(network, batch, 3), of_velocity.loss(velocity_twin(network), batch, 3)
    for name in ("mse", "vb"):
        torch.testing.assert_close(found.metrics[name], expected.metrics[name], **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    # Without weights the error of velocity is that of noise over abar.
    t = keyed_timesteps(3, batch.sample_numbers, 1000)
    bare = [replace(each, min_snr_gamma=None) for each in (of_noise, of_velocity)]
    eps_mse = bare[0].loss(network, batch, 3).metrics["mse"]
    v_mse = bare[1].loss(velocity_twin(network), batch, 3).metrics["mse"]
    torch.testing.assert_close(v_mse * IDDPM().alphas_cumprod[t].float(), eps_mse, **CLOSE)
    with pytest.raises(ValueError, match="needs the snr of a network that predicts noise or velocity"):
        prediction_mse(batch.latents_mean, batch.latents_std, eps_mse, 5.0, "flow")


def test_a_controlnet_learns_around_a_base_of_any_kind() -> None:
    batch = make_batch(4)
    batch.control_mean, batch.control_std = 0.3 * batch.latents_mean, batch.latents_std  # type: ignore[attr-defined]
    base = make_network(0)
    options = {"class_dropout_prob": 0.0, "min_snr_gamma": 5.0}

    def loss(kind: str, network: torch.nn.Module, **more: object) -> Tensor:
        control = ControlPixArt(network, 1)  # type: ignore[arg-type]
        torch.nn.init.normal_(
            control.controlnet[0].after_proj.weight, std=0.2, generator=torch.Generator().manual_seed(0)
        )
        made = ControlObjective(IDDPM(""), 0.5, **{**options, **more}, prediction_type=kind)  # type: ignore[arg-type]
        output = made.loss(control, batch, 3)
        output.loss.backward()
        assert control.controlnet[0].after_proj.weight.grad.abs().max() > 0
        return output.loss.detach()

    torch.testing.assert_close(loss("v_prediction", velocity_twin(base)), loss("epsilon", base), **CLOSE)
    assert loss("flow", base, min_snr_gamma=None, learn_variance=False).isfinite()


@pytest.mark.parametrize("huber_c", [None, 0.001])
def test_consistency_of_velocity_is_that_of_noise(huber_c: float | None) -> None:
    student, batch = make_network(0), make_batch(4)
    of_noise = objective(huber_c=huber_c, guidance=(3.0, 5.0))
    of_velocity = replace(of_noise, prediction_type="v_prediction")
    assert of_noise.roles is not None
    of_velocity.roles = Roles(velocity_twin(of_noise.roles.teacher), velocity_twin(of_noise.roles.target))  # type: ignore[arg-type]
    expected = of_noise.loss(student, batch, 7).metrics["distance"]
    found = of_velocity.loss(velocity_twin(student), batch, 7).metrics["distance"]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_consistency_along_straight_paths_is_the_algorithm_written_out() -> None:
    student, batch, shift = make_network(0), make_batch(4), 3.0
    made: ConsistencyObjective = replace(objective(huber_c=None), prediction_type="flow", flow_shift=shift)
    assert made.roles is not None
    numbers, shape, w = batch.sample_numbers, batch.latents_mean.shape[1:], 4.5
    x0 = 0.5 * (batch.latents_mean + batch.latents_std * keyed_normal(7, "posterior", numbers, shape))
    n = keyed_timesteps(7, numbers, 50)
    s, earlier = (shift * u / (1 + (shift - 1) * u) for u in ((n + 1) / 50, n / 50))

    def velocity(network: torch.nn.Module, x: Tensor, sigma: Tensor, null: bool = False) -> Tensor:
        caption = made.null_embeds.expand(4, -1, -1) if null else batch.caption_embeds  # type: ignore[union-attr]
        return network(x, 1000 * sigma, caption)[:, :4]

    def column(sigma: Tensor) -> Tensor:
        return sigma.view(-1, 1, 1, 1)

    x_s = (1 - column(s)) * x0 + column(s) * keyed_normal(7, "noise", numbers, shape)
    with torch.no_grad():
        cond, uncond = (velocity(made.roles.teacher, x_s, s, null) for null in (False, True))
        x_r = x_s + column(earlier - s) * (cond + w * (cond - uncond))  # Euler
        first = x_s - column(s) * velocity(student, x_s, s)
        second = x_r - column(earlier) * velocity(made.roles.target, x_r, earlier)
    expected = (first - second).square().flatten(1).mean(1)
    torch.testing.assert_close(made.loss(student, batch, 7).metrics["distance"], expected, **CLOSE)
    begin, end = made.grid.interval(torch.tensor([0, 49]))
    assert (end[0].item(), begin[1].item()) == (0, 1)


def test_distribution_matching_of_velocity_is_that_of_noise() -> None:
    networks, made, batch = parts(regression_weight=0.5)
    twins = OneStepNetworks(velocity_twin(networks.generator), velocity_twin(networks.fake))
    of_velocity = replace(made, prediction_type="v_prediction", teacher=velocity_twin(made.teacher))  # type: ignore[arg-type]
    expected, found = made.loss(networks, batch, 5).metrics, of_velocity.loss(twins, batch, 5).metrics
    for name in ("matching", "regression"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    assert (found["fake"] >= expected["fake"]).all()  # the fake network learns velocity: its error over abar
