"""Post-hoc EMA: the average of any length from stored averages of two (Karras et al., arXiv:2312.02696).

A power-function average weighs the weights at time tau by tau^gamma (Sec. 3.1). Its length is sigma_rel, the standard
deviation of that profile as a share of the training time. Any other profile is, nearly, a combination of the stored
ones, and so is its average (Sec. 3.2, Appendix C). Pure functions in float64; steps count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import ConfigError

SIGMA_REL_LIMIT = 12**-0.5  # the length at gamma = 0, where all steps weigh the same


class Profile(NamedTuple):
    """An average of length sigma_rel over the steps 1..step."""

    step: int
    sigma_rel: float


class Combination(NamedTuple):
    """Coefficients of stored averages, and ||combined - wanted profile|| / ||wanted profile||: 0 = exact."""

    coefficients: NDArray[np.float64]
    relative_error: float


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile: the root of sigma_rel^2 (g + 2)^2 (g + 3) = g + 1 with g > 0 (Sec. 3.1).

    Raises:
        ConfigError: sigma_rel outside (0, 12^-0.5).
    """
    if not 0 < sigma_rel < SIGMA_REL_LIMIT:
        raise ConfigError(f"sigma_rel={sigma_rel} must be between 0 and 0.288 (exclusive); usual are 0.03 to 0.2")
    square = sigma_rel**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def update_weight(gamma: float, step: int) -> float:
    """Share 1 - beta of the newest weights in the average; beta = (1 - 1 / step)^(gamma + 1) (Sec. 3.1)."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """Integrals of the products of profiles, each normalised to 1: (len(a), len(b)) (Appendix C).

    For steps s <= t: (gs + 1)(gt + 1) / (gs + gt + 1) (s / t)^gt / t, a form without large powers.
    """
    steps_a, gammas_a = (column[:, None] for column in _columns(a))
    steps_b, gammas_b = _columns(b)
    first, last = np.minimum(steps_a, steps_b), np.maximum(steps_a, steps_b)
    gamma_of_last = np.where(steps_a < steps_b, gammas_b, gammas_a)
    scale = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
    return scale * (first / last) ** gamma_of_last / last


def combine(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of stored averages nearest to a wanted one in least squares (Appendix C).

    The coefficients sum to 1, which the paper does not ask: weights that never changed then stay exactly what they are,
    and those that changed little err by less.

    Args:
        stored: different profiles, at least one; none later than the wanted one can help.
    """
    products, target = inner_products(stored, stored), inner_products(stored, [wanted])[:, 0]
    size, scale = len(stored), products.max()
    system = np.zeros((size + 1, size + 1))  # the normal equations, bordered by the sum (a Lagrange multiplier)
    system[:size, :size] = products
    system[size, :size] = system[:size, size] = scale
    coefficients = np.linalg.solve(system, np.append(target, scale))[:size]
    norm = inner_products([wanted], [wanted])[0, 0]
    square = norm - 2 * coefficients @ target + coefficients @ products @ coefficients
    return Combination(coefficients, math.sqrt(max(square, 0.0) / norm))


def _columns(profiles: Sequence[Profile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and exponents."""
    steps = np.array([profile.step for profile in profiles], dtype=np.float64)
    return steps, np.array([gamma_of(profile.sigma_rel) for profile in profiles])
