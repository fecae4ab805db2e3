"""Profiles and their combinations against quadrature, brute force and the paper's figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from diffusion.errors import ConfigError
from diffusion.training.posthoc_ema import Profile, combine, gamma_of, inner_products, update_weight

STORED = [Profile(step, sigma_rel) for step in range(50, 1001, 50) for sigma_rel in (0.05, 0.10)]


def density(profile: Profile, time: np.ndarray) -> np.ndarray:
    """The profile at a time, normalised to 1."""
    gamma = gamma_of(profile.sigma_rel)
    inside = np.minimum(time / profile.step, 1.0)
    return np.where(time <= profile.step, (gamma + 1) * inside**gamma / profile.step, 0.0)


def test_gamma_of_the_papers_lengths() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.2, 0.288])
def test_length_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    profile = Profile(1, sigma_rel)
    moments = [integrate.quad(lambda t, k=k: t**k * density(profile, t), 0, 1)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1)
    assert math.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, math.inf, math.nan])
def test_impossible_lengths(sigma_rel: float) -> None:
    with pytest.raises(ConfigError, match="must be between 0 and 0.288"):
        gamma_of(sigma_rel)


def test_inner_products_against_quadrature() -> None:
    profiles = [Profile(300, 0.05), Profile(300, 0.1), Profile(700, 0.05), Profile(1000, 0.2)]
    found = inner_products(profiles, profiles)
    for i, a in enumerate(profiles):
        for j, b in enumerate(profiles):
            end = min(a.step, b.step)
            expected, _ = integrate.quad(lambda t, a=a, b=b: density(a, t) * density(b, t), 0, end)
            assert found[i, j] == pytest.approx(expected, rel=1e-7)
    # No power of a step may overflow in a long run.
    long = [Profile(10**7, 0.01), Profile(100, 0.01)]
    assert np.isfinite(inner_products(long, long)).all()


def test_updates_are_the_profile_step_by_step() -> None:
    """What the recursion gives each step is the integral of the profile over that step."""
    gamma, steps = gamma_of(0.1), 60
    shares: list[float] = []
    for step in range(1, steps + 1):
        weight = update_weight(gamma, step)
        shares = [(1 - weight) * share for share in shares] + [weight]
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    np.testing.assert_allclose(shares, np.diff(edges), rtol=1e-10, atol=1e-300)
    assert update_weight(gamma, 10**9) == pytest.approx((gamma + 1) * 1e-9, rel=1e-7)


@pytest.mark.parametrize("wanted", [STORED[-1], STORED[-2], STORED[17]])
def test_a_stored_average_is_itself(wanted: Profile) -> None:
    coefficients, error = combine(STORED, wanted)
    expected = [float(profile == wanted) for profile in STORED]
    np.testing.assert_allclose(coefficients, expected, atol=1e-11)
    assert error < 1e-6


@pytest.mark.parametrize(("sigma_rel", "largest_error"), [(0.03, 0.15), (0.08, 0.01), (0.15, 0.01), (0.25, 0.07)])
def test_combination_is_the_nearest_profile(sigma_rel: float, largest_error: float) -> None:
    """The error that is reported is the one of sampled profiles, and no other coefficients of sum 1 do better."""
    wanted = Profile(1000, sigma_rel)
    coefficients, error = combine(STORED, wanted)
    assert coefficients.sum() == pytest.approx(1, abs=1e-12)
    assert error < largest_error
    time = (np.arange(200_000) + 0.5) / 200
    sampled = np.stack([density(profile, time) for profile in STORED])
    target = density(wanted, time)

    def distance(mixed: np.ndarray) -> float:
        return float(np.linalg.norm(mixed @ sampled - target) / np.linalg.norm(target))

    assert distance(coefficients) == pytest.approx(error, rel=0.02)
    generator = np.random.default_rng(0)
    for _ in range(20):
        change = generator.standard_normal(len(STORED))
        assert distance(coefficients + 1e-3 * (change - change.mean())) > distance(coefficients)


def test_one_snapshot_is_enough_to_answer() -> None:
    coefficients, error = combine([Profile(10, 0.05)], Profile(10, 0.1))
    assert coefficients.tolist() == [1.0]
    assert error > 0.2
