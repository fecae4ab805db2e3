"""The noise process against closed forms, Monte Carlo and float64."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from diffusion.errors import ConfigError
from diffusion.process import IDDPM, keyed_integer, keyed_normal, keyed_uniform, make_betas, spaced_timesteps
from diffusion.process.likelihood import discretized_gaussian_log_likelihood, gaussian_kl


def test_schedules() -> None:
    betas = make_betas("linear", 1000)
    assert (betas[0].item(), betas[-1].item()) == (1e-4, pytest.approx(0.02))
    assert make_betas("linear", 100)[-1].item() == pytest.approx(0.2)
    cosine = torch.cumprod(1 - make_betas("squaredcos_cap_v2", 1000), 0)
    expected = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert cosine[499].item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        make_betas("liner")


def test_respacing() -> None:
    hundred = spaced_timesteps(1000, "100")
    assert hundred[:3] == [0, 10, 20]
    assert hundred[-2:] == [989, 999]
    assert spaced_timesteps(1000, "ddim25") == list(range(0, 1000, 40))
    sections = spaced_timesteps(300, "10,15,20")
    assert [sum(100 * k <= t < 100 * (k + 1) for t in sections) for k in range(3)] == [10, 15, 20]
    assert spaced_timesteps(1000, "") == list(range(1000))
    with pytest.raises(ConfigError, match="cannot keep"):
        spaced_timesteps(10, "20")


def test_respaced_process_has_the_same_marginals() -> None:
    full, short = IDDPM(""), IDDPM("10")
    torch.testing.assert_close(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map])
    torch.testing.assert_close(torch.cumprod(1 - short.betas, 0), short.alphas_cumprod)


def test_q_sample_is_the_product_of_single_steps() -> None:
    process, generator = IDDPM("8"), torch.Generator().manual_seed(0)
    x = torch.full((200_000,), 1.5, dtype=torch.float64)
    for beta in process.betas[:5]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    t = torch.full((200_000,), 4)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    direct = process.q_sample(torch.full_like(x, 1.5), t, noise)
    assert x.mean().item() == pytest.approx(direct.mean().item(), abs=0.01)
    assert x.std().item() == pytest.approx(direct.std().item(), rel=0.01)


def test_conversions_invert_each_other() -> None:
    process, t = IDDPM(""), torch.tensor([0, 10, 500, 999])
    x0, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    noisy = process.q_sample(x0, t, noise)
    torch.testing.assert_close(process.predict_x0(noisy, t, noise), x0)
    torch.testing.assert_close(process.predict_eps(noisy, t, x0), noise)
    alpha_bar = process.alphas_cumprod[t].view(-1, 1, 1, 1)
    velocity = process.target(x0, t, noise, "v_prediction")
    torch.testing.assert_close(alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * velocity, x0)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): multiply the two normals."""
    process, t = IDDPM(""), torch.tensor([1, 300, 999])
    x0 = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    x_t = torch.tensor([0.1, 0.7, -0.4], dtype=torch.float64)
    beta, previous = process.betas[t], process.alphas_cumprod[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - previous)
    mean = ((1 - beta).sqrt() * x_t / beta + previous.sqrt() * x0 / (1 - previous)) / precision
    found_mean, found_variance, found_log = process.q_posterior(x0, x_t, t)
    torch.testing.assert_close(found_mean, mean)
    torch.testing.assert_close(found_variance, 1 / precision)
    torch.testing.assert_close(found_log, -precision.log())


def test_learned_range_ends() -> None:
    process, t = IDDPM(""), torch.tensor([0, 1, 700])
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(process.learned_range_log_variance(ones, t), process.betas[t].log())
    low = process.learned_range_log_variance(-ones, t)
    torch.testing.assert_close(low[1:], process.posterior_variance[t[1:]].log())
    assert low[0] == low[1]


def test_first_step_is_exact_in_float32() -> None:
    """1 - alpha_bar in float32 would be wrong in the fourth digit at t = 0."""
    process, t = IDDPM(""), torch.zeros(1, dtype=torch.long)
    x0 = torch.tensor([[0.7]])
    mean, _, _ = process.q_posterior(x0, torch.tensor([[123.0]]), t)
    torch.testing.assert_close(mean, x0, rtol=1e-6, atol=0)


def test_kl_against_quadrature() -> None:
    p, q = stats.norm(0.4, math.exp(0.5 * -0.3)), stats.norm(-0.2, math.exp(0.5 * 0.5))
    expected, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -12, 12)
    found = gaussian_kl(*(torch.tensor(v, dtype=torch.float64) for v in (0.4, -0.3, -0.2, 0.5)))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_bin_likelihood_against_the_exact_normal() -> None:
    x = torch.tensor([-1.0, -0.4, 0.0, 0.8, 1.0], dtype=torch.float64)
    found = discretized_gaussian_log_likelihood(x, torch.zeros_like(x), torch.full_like(x, -1.0), 1 / 255)
    normal = stats.norm(0, math.exp(-1.0))
    edges = [(-math.inf, -1 + 1 / 255), (-0.4 - 1 / 255, -0.4 + 1 / 255), (-1 / 255, 1 / 255)]
    edges += [(0.8 - 1 / 255, 0.8 + 1 / 255), (1 - 1 / 255, math.inf)]
    expected = [math.log(normal.cdf(high) - normal.cdf(low)) for low, high in edges]
    # The tanh form of the CDF is within 3e-4 of the normal's; near its tails the density differs by a few percent.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=0.08, rtol=0)


def test_keyed_draws_are_pure_functions() -> None:
    numbers = torch.arange(64)
    normal = keyed_normal(3, "noise", numbers, (4, 5))
    torch.testing.assert_close(keyed_normal(3, "noise", numbers[10:12], (4, 5)), normal[10:12], rtol=0, atol=0)
    for other in (keyed_normal(4, "noise", numbers, (4, 5)), keyed_normal(3, "posterior", numbers, (4, 5))):
        assert not torch.equal(other, normal)
    assert keyed_integer(3, "caption", 17, 5) == keyed_integer(3, "caption", 17, 5)
    counts = torch.bincount(torch.tensor([keyed_integer(0, "caption", n, 4) for n in range(4000)]))
    assert counts.min() > 900
    with pytest.raises(ValueError, match="at least 1"):
        keyed_integer(0, "caption", 0, 0)


def test_keyed_draws_have_their_distributions() -> None:
    numbers = torch.arange(3000)
    normal = keyed_normal(0, "noise", numbers, (32,))
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    uniform = keyed_uniform(0, "timestep", numbers)
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert abs(torch.corrcoef(normal[:, :2].T)[0, 1].item()) < 0.06
    assert abs(torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1].item()) < 0.06
