"""What a network predicts, and the picture and the noise that it means: the one place that knows the kinds.

A noisy sample is x_t = a x_0 + s noise. With a^2 + s^2 = 1 (the Gaussian process) a network predicts "epsilon", the
noise, or "v_prediction", a noise - s x_0 (arXiv:2202.00512, App. D); with a = 1 - s (straight paths) "flow",
noise - x_0 (arXiv:2209.03003).
"""

from __future__ import annotations

from torch import Tensor


def prediction_target(kind: str, x0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this kind shall predict; x0, noise (B, C, h, w), signal a and sigma s (B, 1, 1, 1).

    Raises:
        ValueError: unknown kind.
    """
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal * noise - sigma * x0
    if kind == "flow":
        return noise - x0
    raise ValueError(f"prediction type {kind!r} must be epsilon, v_prediction or flow")


def x0_and_noise(kind: str, prediction: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 and noise that a prediction implies for x_t, so that a x_0 + s noise = x_t; shapes as `prediction_target`.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "epsilon":
        return (x_t - sigma * prediction) / signal, prediction
    if kind == "v_prediction":
        return signal * x_t - sigma * prediction, sigma * x_t + signal * prediction
    if kind == "flow":
        return x_t - sigma * prediction, x_t + signal * prediction
    raise ValueError(f"prediction type {kind!r} must be epsilon, v_prediction or flow")
