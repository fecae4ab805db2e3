"""One step of latent consistency distillation, against the algorithm written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusion.models import PixArt
from diffusion.objectives import ConsistencyObjective, Roles
from diffusion.process import IDDPM, boundary_scalings, keyed_normal, keyed_timesteps, keyed_uniform
from tests.objectives.test_denoising import make_batch, model


def make_network(seed: int) -> PixArt:
    network = model()
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    return network


def objective(**options: object) -> ConsistencyObjective:
    null = torch.randn(2, 24, generator=torch.Generator().manual_seed(3))
    made = ConsistencyObjective(IDDPM(""), 0.5, null_embeds=null, class_dropout_prob=0.0, **options)
    made.roles = Roles(make_network(1), make_network(2))
    return made


@pytest.mark.parametrize("guidance", [(3.5, 3.5), (3.0, 15.0)])
def test_a_step_is_algorithm_1(guidance: tuple[float, float]) -> None:
    student, batch = make_network(0), make_batch(4)
    made = objective(guidance=guidance, huber_c=None)
    teacher, target = made.roles.teacher, made.roles.target  # type: ignore[union-attr]
    numbers, process = batch.sample_numbers, made.process
    shape = batch.latents_mean.shape[1:]
    x0 = 0.5 * (batch.latents_mean + batch.latents_std * keyed_normal(7, "posterior", numbers, shape))
    n = keyed_timesteps(7, numbers, 50)
    t, s = 20 * (n + 1) - 1, (20 * n - 1).clamp(min=0)
    w = guidance[0] + (guidance[1] - guidance[0]) * keyed_uniform(7, "guidance", numbers)
    alpha = process.alphas_cumprod.float()

    def split(time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return alpha[time].sqrt().view(-1, 1, 1, 1), (1 - alpha[time]).sqrt().view(-1, 1, 1, 1)

    def f(network: torch.nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        eps = network(x, time.float(), batch.caption_embeds, batch.caption_mask)[:, :4]
        c_skip, c_out = boundary_scalings(time)
        signal, sigma = split(time)
        return c_skip * x + c_out * (x - sigma * eps) / signal

    signal, sigma = split(t)
    x_t = signal * x0 + sigma * keyed_normal(7, "noise", numbers, shape)
    with torch.no_grad():
        cond = teacher(x_t, t.float(), batch.caption_embeds, batch.caption_mask)[:, :4]
        null = made.null_embeds.expand(4, -1, -1)  # type: ignore[union-attr]
        uncond = teacher(x_t, t.float(), null)[:, :4]
        eps = cond + w.view(-1, 1, 1, 1) * (cond - uncond)
        later_signal, later_sigma = split(s)
        x_s = later_signal * (x_t - sigma * eps) / signal + later_sigma * eps
        expected = (f(student, x_t, t) - f(target, x_s, s)).square().flatten(1).mean(1)
    torch.testing.assert_close(made.loss(student, batch, 7).metrics["distance"], expected, rtol=2e-3, atol=1e-4)


def test_only_the_student_gets_gradients_and_draws_follow_the_samples() -> None:
    student, batch = make_network(0), make_batch(4)
    made = objective()
    whole = made.loss(student, batch, 7)
    whole.loss.backward()
    assert student.final_layer.linear.weight.grad.abs().max() > 0
    assert made.roles.teacher.final_layer.linear.weight.grad is None  # type: ignore[union-attr]
    assert made.roles.target.final_layer.linear.weight.grad is None  # type: ignore[union-attr]
    parts = [made.loss(student, batch[slice(i, i + 2)], 7).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, whole.loss)
    assert made.loss(student, batch, 8).loss != whole.loss
    assert made.for_validation().roles is made.roles
    half = replace(made, class_dropout_prob=1.0)  # every caption null: guidance then has no direction
    assert torch.equal(
        half.loss(student, batch, 7).loss, replace(half, guidance=(0.0, 0.0)).loss(student, batch, 7).loss
    )
