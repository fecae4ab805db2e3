"""Draws of timesteps: recorded values, the exact distribution, the ends of the range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion.process import LogitNormal, keyed_timesteps

NUMBERS = torch.tensor([0, 1, 2, 3, 10, 12345, 10**9, 2**40])


@pytest.mark.parametrize(
    ("seed", "num_timesteps", "recorded"),
    [
        (43, 1000, [471, 694, 720, 41, 356, 142, 554, 17]),
        (0, 1000, [253, 911, 159, 517, 420, 253, 884, 410]),
        (43, 8, [3, 5, 5, 0, 2, 1, 4, 0]),
    ],
)
def test_uniform_draws_are_those_recorded(seed: int, num_timesteps: int, recorded: list[int]) -> None:
    """A change here would change every training run."""
    assert keyed_timesteps(seed, NUMBERS, num_timesteps).tolist() == recorded


@pytest.mark.parametrize("density", [None, LogitNormal(), LogitNormal(-0.6, 0.5), LogitNormal(1.0, 2.0)])
def test_draws_follow_the_exact_distribution(density: LogitNormal | None) -> None:
    """Kolmogorov-Smirnov over all T steps; on a discrete distribution the test errs on the safe side."""
    count, num_timesteps = 50_000, 1000
    drawn = keyed_timesteps(5, torch.arange(count), num_timesteps, density)
    share = np.cumsum(np.bincount(drawn.numpy(), minlength=num_timesteps)) / count
    ends = np.arange(1, num_timesteps + 1) / num_timesteps
    with np.errstate(divide="ignore"):
        logits = np.log(ends) - np.log1p(-ends)
    exact = ends if density is None else stats.norm.cdf(logits, density.mean, density.std)
    distance = np.abs(share - exact).max()
    assert stats.kstwo.sf(distance, count) > 1e-3
    assert len(share) == num_timesteps


def test_extreme_densities_stay_in_range() -> None:
    drawn = keyed_timesteps(0, torch.arange(1000), 10, LogitNormal(0.0, 100.0))
    assert (drawn.min().item(), drawn.max().item()) == (0, 9)


def test_a_draw_depends_on_its_sample_number_alone() -> None:
    drawn = keyed_timesteps(1, torch.arange(64), 1000, LogitNormal())
    assert torch.equal(keyed_timesteps(1, torch.arange(10, 20), 1000, LogitNormal()), drawn[10:20])
    assert not torch.equal(keyed_timesteps(2, torch.arange(64), 1000, LogitNormal()), drawn)
