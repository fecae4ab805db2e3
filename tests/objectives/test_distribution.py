"""The terms of distribution matching, written out once more, and where their gradients go."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from diffusion.objectives import DistributionMatching, OneStepNetworks, pair_noise
from diffusion.process import IDDPM, keyed_normal, keyed_uniform
from tests.objectives.test_consistency import make_network
from tests.objectives.test_denoising import Batch, make_batch


@dataclass
class NamedBatch(Batch):
    keys: list[str] = field(default_factory=lambda: ["a", "b", "c", "d"])


def parts(**options: object) -> tuple[OneStepNetworks, DistributionMatching, NamedBatch]:
    networks = OneStepNetworks(make_network(0), make_network(1))
    null = torch.randn(2, 24, generator=torch.Generator().manual_seed(3))
    made = DistributionMatching(IDDPM(""), 0.5, null_embeds=null, class_dropout_prob=0.0, **options)
    made.teacher = make_network(2)
    return networks, made, NamedBatch(**vars(make_batch(4)))


def test_the_terms_are_the_papers() -> None:
    networks, made, batch = parts()
    numbers, process = batch.sample_numbers, made.process
    shape = batch.latents_mean.shape[1:]
    alpha = process.alphas_cumprod.float()

    def clean(network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        eps = network(x, t.float(), embeds)[:, :4]
        a = alpha[t].view(-1, 1, 1, 1)
        return (x - (1 - a).sqrt() * eps) / a.sqrt()

    with torch.no_grad():
        drawn = clean(
            networks.generator, keyed_normal(5, "noise", numbers, shape), torch.full((4,), 400), batch.caption_embeds
        )
        t = 1 + (keyed_uniform(5, "score_timestep", numbers) * 949).long()
        a = alpha[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * drawn + (1 - a).sqrt() * keyed_normal(5, "score_noise", numbers, shape)
        cond = clean(made.teacher, noisy, t, batch.caption_embeds)
        uncond = clean(made.teacher, noisy, t, made.null_embeds.expand(4, -1, -1))
        real = uncond + 3 * (cond - uncond)
        fake = clean(networks.fake, noisy, t, batch.caption_embeds)
        grad = (fake - real) / (1 - a).sqrt() / ((drawn - real).abs().mean((1, 2, 3), keepdim=True) + 1e-5)
        expected = grad.square().mean((1, 2, 3))
    found = made.loss(networks, batch, 5)
    torch.testing.assert_close(found.metrics["matching"], expected, rtol=5e-3, atol=1e-4)
    torch.testing.assert_close(found.loss, (found.metrics["matching"] + found.metrics["fake"]).mean())


def test_each_term_teaches_one_network() -> None:
    networks, made, batch = parts()
    made.loss(networks, batch, 5).loss.backward()
    both = copy.deepcopy(networks)
    for name, others in (("generator", "fake"), ("fake", "generator")):
        gradient = getattr(networks, name).final_layer.linear.weight.grad
        assert gradient.abs().max() > 0
        alone = OneStepNetworks(both.generator, both.fake)
        alone.zero_grad()
        getattr(alone, others).requires_grad_(False)
        getattr(alone, name).requires_grad_(True)
        made.loss(alone, batch, 5).loss.backward()
        torch.testing.assert_close(getattr(alone, name).final_layer.linear.weight.grad, gradient)
    assert made.teacher.final_layer.linear.weight.grad is None


def test_pairs_are_regressed_from_their_own_noise() -> None:
    networks, made, batch = parts(regression_weight=0.25)
    first = made.loss(networks, batch, 5)
    assert set(first.metrics) == {"matching", "fake", "regression"}
    assert torch.equal(first.metrics["regression"], made.loss(networks, batch, 6).metrics["regression"])
    made.distance = lambda drawn, teachers: (drawn - teachers).square().flatten(1).mean(1)
    torch.testing.assert_close(made.loss(networks, batch, 5).loss, first.loss)
    noise = pair_noise(["a", "b"], (4, 8, 8))
    assert torch.equal(noise[1:], pair_noise(["b"], (4, 8, 8)))
    assert abs(noise.std() - 1) < 0.1
