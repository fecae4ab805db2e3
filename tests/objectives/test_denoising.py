"""The training loss against closed forms, the original's recorded values, and its own promises about draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from diffusion.models import PixArt
from diffusion.objectives import DenoisingObjective, drop_captions, prediction_mse, variance_bound
from diffusion.process import IDDPM, LogitNormal, keyed_normal, keyed_timesteps


@dataclass
class Batch:
    latents_mean: torch.Tensor
    latents_std: torch.Tensor
    caption_embeds: torch.Tensor
    caption_mask: torch.Tensor
    img_hw: torch.Tensor
    aspect_ratio: torch.Tensor
    sample_numbers: torch.Tensor

    def __getitem__(self, index: slice) -> Batch:
        return Batch(*(value[index] for value in vars(self).values()))


def make_batch(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(count, 4, 8, 8, generator=generator),
        torch.rand(count, 4, 8, 8, generator=generator),
        torch.randn(count, 5, 24, generator=generator),
        torch.ones(count, 5, dtype=torch.bool),
        torch.full((count, 2), 64.0),
        torch.ones(count),
        torch.arange(100, 100 + count),
    )


def model() -> PixArt:
    torch.manual_seed(0)
    network = PixArt(hidden_size=48, num_heads=2, depth=2, caption_channels=24, input_size=8)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    return network


def test_values_recorded_from_the_original() -> None:
    """seed-0 x0 then noise, zero network: the original's mse and vb terms."""
    torch.manual_seed(0)
    x0, noise = torch.randn(4, 4, 64, 64), torch.randn(4, 4, 64, 64)
    objective = DenoisingObjective(IDDPM(""), 1.0)
    terms = objective.terms(lambda x, t: torch.zeros(4, 8, 64, 64), x0, torch.tensor([0, 1, 500, 999]), noise)
    recorded_mse = torch.tensor([1.010579, 1.018757, 0.996688, 1.006538])
    recorded_vb = torch.tensor([1.996539, 0.643656, 0.007926, 0.014818])
    torch.testing.assert_close(terms.metrics["mse"], recorded_mse, atol=2e-6, rtol=0)
    torch.testing.assert_close(terms.metrics["vb"], recorded_vb, atol=5e-6, rtol=0)
    assert terms.loss.item() == pytest.approx((recorded_mse + recorded_vb).mean().item(), abs=1e-5)


def test_bound_of_the_exact_posterior_is_zero() -> None:
    """With the true noise, and the variance at its lower end, q and p agree for t > 0."""
    process, t = IDDPM(""), torch.tensor([5, 400, 999])
    x0, noise = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
    noisy = process.q_sample(x0, t, noise)
    bound = variance_bound(process, noise, -torch.ones_like(noise), x0, noisy, t)
    # x0 recovered from the noise at t = 999 carries float32 rounding, since the term is computed in float32.
    torch.testing.assert_close(bound, torch.zeros_like(bound), atol=1e-5, rtol=0)


def test_bound_teaches_the_variance_alone() -> None:
    process, t = IDDPM(""), torch.tensor([0, 300])
    x0, noise = torch.randn(2, 2, 4, 4, 4)
    noise_pred = noise.clone().requires_grad_()
    v = torch.zeros_like(noise).requires_grad_()
    variance_bound(process, noise_pred, v, x0, process.q_sample(x0, t, noise), t).sum().backward()
    assert noise_pred.grad is None
    assert v.grad.abs().max() > 0


def test_min_snr_weights() -> None:
    pred, noise = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    snr = torch.tensor([0.0, 5.0, 50.0])
    torch.testing.assert_close(prediction_mse(pred, noise, snr, 5.0), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(prediction_mse(pred, noise, snr), torch.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        prediction_mse(torch.zeros(3, 2, 2, 2), noise, snr)
    with pytest.raises(ValueError, match="positive"):
        prediction_mse(pred, noise, snr, -1.0)


def test_loss_does_not_depend_on_how_a_batch_is_split() -> None:
    network, batch = model(), make_batch(6)
    objective = DenoisingObjective(IDDPM(""), 0.5, null_embeds=torch.randn(2, 24), class_dropout_prob=0.5)
    whole = objective.loss(network, batch, seed=7).loss
    parts = [objective.loss(network, batch[slice(i, i + 2)], seed=7).loss for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)
    assert objective.loss(network, batch, seed=8).loss != whole


def test_min_snr_weights_the_steps_that_logit_normal_draws() -> None:
    """The whole loss of a zero network, written out."""
    batch, density = make_batch(64), LogitNormal(-0.5, 1.2)
    objective = DenoisingObjective(
        IDDPM(""), 1.0, min_snr_gamma=5.0, learn_variance=False, logit_normal=density, class_dropout_prob=0.0
    )
    network = model()
    torch.nn.init.zeros_(network.final_layer.linear.weight)
    found = objective.loss(network, batch, seed=3).metrics["mse"]
    timesteps = keyed_timesteps(3, batch.sample_numbers, 1000, density)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[timesteps]
    weight = (5 * (1 - alpha_bar) / alpha_bar).clamp(max=1)
    assert 0.1 < (weight < 1).double().mean() < 0.9  # both branches are met
    error = keyed_normal(3, "noise", batch.sample_numbers, (4, 8, 8)).double().square().flatten(1).mean(1)
    torch.testing.assert_close(found.double(), weight * error, rtol=1e-5, atol=1e-7)


def test_without_the_bound_the_variance_is_not_trained() -> None:
    batch, network = make_batch(4), model()
    objective = DenoisingObjective(IDDPM(""), 1.0, null_embeds=torch.zeros(1, 24), learn_variance=False)
    output = objective.loss(network, batch, seed=0)
    output.loss.backward()
    assert set(output.metrics) == {"mse"}
    torch.testing.assert_close(output.loss.detach(), output.metrics["mse"].mean())
    gradient = network.final_layer.linear.weight.grad.view(2, 2, 8, -1)  # (patch, patch, 2C, D)
    assert gradient[:, :, :4].abs().min(dim=-1).values.max() > 0
    assert gradient[:, :, 4:].abs().max() == 0


def test_posterior_is_sampled_and_scaled() -> None:
    batch = make_batch(4)
    seen = {}

    class Spy(DenoisingObjective):
        def terms(self, denoise, latents, timesteps, noise):  # type: ignore[no-untyped-def]
            seen["latents"] = latents
            return super().terms(denoise, latents, timesteps, noise)

    Spy(IDDPM(""), 0.5, sample_latents=False).loss(model(), batch, 0)
    torch.testing.assert_close(seen["latents"], 0.5 * batch.latents_mean)
    Spy(IDDPM(""), 0.5).loss(model(), batch, 0)
    draws = (seen["latents"] / 0.5 - batch.latents_mean) / batch.latents_std
    assert draws.std().item() == pytest.approx(1.0, abs=0.1)


def test_t5_null_caption_brings_its_own_mask() -> None:
    embeds, mask = torch.ones(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    null = torch.full((1, 4), 9.0)
    drop = torch.tensor([True, False])
    found, keep = drop_captions(embeds, mask, drop, null, torch.ones(1, dtype=torch.bool))
    assert keep.tolist() == [[True, False, False], [True, True, False]]
    assert found[0, 0].tolist() == [9.0] * 4
    torch.testing.assert_close(found[1], embeds[1])


def test_longer_t5_null_caption_grows_the_batch() -> None:
    null = torch.full((5, 4), 2.0)
    found, keep = drop_captions(
        torch.ones(1, 3, 4), torch.ones(1, 3).bool(), torch.tensor([True]), null, torch.ones(5).bool()
    )
    assert found.shape == (1, 5, 4)
    assert keep.all()


def test_stored_null_caption_keeps_the_captions_mask() -> None:
    mask = torch.tensor([[1, 1, 0]]).bool()
    null = torch.arange(6 * 4).view(6, 4).float()
    found, keep = drop_captions(torch.ones(1, 3, 4), mask, torch.tensor([True]), null)
    torch.testing.assert_close(found[0], null[:3])
    assert torch.equal(keep, mask)
    with pytest.raises(ValueError, match="2 tokens"):
        drop_captions(torch.ones(1, 3, 4), mask, torch.tensor([True]), null[:2])


def test_dropout_rate() -> None:
    network, batch = model(), make_batch(1)
    count = 4000
    wide = Batch(*(value.expand(count, *value.shape[1:]) for value in vars(batch).values()))
    wide.sample_numbers = torch.arange(count)
    objective = DenoisingObjective(IDDPM(""), 1.0, class_dropout_prob=0.1, null_embeds=torch.zeros(1, 24))
    seen = {}

    def spy(model, batch, drop):  # type: ignore[no-untyped-def]
        seen["share"] = drop.float().mean().item()
        raise StopIteration

    objective.drop_captions = spy  # type: ignore[method-assign]
    with pytest.raises(StopIteration):
        objective.loss(network, wide, 0)
    assert seen["share"] == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / count))
