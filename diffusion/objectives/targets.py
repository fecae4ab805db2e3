"""How far a prediction is from its target, for networks of every kind: noise, velocity, flow.

Min-SNR weights: arXiv:2303.09556, Sec. 3.4. L_vlb on the variance alone, learned range: Improved DDPM Sec. 3.1
(arXiv:2102.09672).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.process import GaussianProcess
from diffusion.process.likelihood import discretized_gaussian_log_likelihood, gaussian_kl


def prediction_mse(
    prediction: Tensor,
    target: Tensor,
    snr: Tensor | None = None,
    snr_cap: float | None = None,
    kind: str = "epsilon",
) -> Tensor:
    """Mean squared error of what a network predicts, one value a sample.

    With a cap the error is that of x_0 times min(snr, cap), whatever is predicted: weight min(snr, cap) / snr for
    "epsilon", min(snr, cap) / (snr + 1) for "v_prediction".

    Args:
        prediction, target: (B, C, H, W); noise has unit variance, so a constant zero guess of it scores about 1.
        snr: (B,) signal-to-noise ratio abar_t / (1 - abar_t); 0 is allowed. Read with a cap alone.
        snr_cap: gamma of Min-SNR, usually 5; None = no weighting. Not for "flow".
    Returns:
        (B,) float32, not averaged.
    Raises:
        ValueError: shapes differ, snr_cap is not positive, or a cap that cannot be.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape; "
            "split off the variance channels of a pred_sigma model first"
        )
    loss = (prediction.float() - target.float()).square().flatten(1).mean(1)  # float32: bf16 would round the sum
    if snr_cap is None:
        return loss
    if snr_cap <= 0:
        raise ValueError(f"snr_cap={snr_cap} must be positive; use None for no weighting")
    if snr is None or kind == "flow":
        raise ValueError(f"snr_cap={snr_cap} needs the snr of a network that predicts noise or velocity")
    if kind == "v_prediction":
        return loss * snr.clamp(max=snr_cap) / (snr + 1)
    return loss * (snr_cap / snr).clamp(max=1)  # this form is finite at snr = 0


def variance_bound(
    process: GaussianProcess,
    prediction: Tensor,
    v: Tensor,
    x0: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    kind: str = "epsilon",
) -> Tensor:
    """Variational bound of the learned variance, bits a dimension, one value a sample.

    The mean is taken from the detached prediction, so this term teaches the variance alone. At t = 0 the bound is the
    likelihood of x_0 in bins of half-width 1/255, elsewhere KL(q || p).

    Args:
        prediction, v, x0, x_t: (B, C, H, W), v the variance interpolation; timesteps: (B,) indices.
        kind: of the prediction, "epsilon" or "v_prediction".
    Returns:
        (B,) float32.
    """
    output = torch.cat([prediction.detach(), v], dim=1).float()
    mean, log_variance, _ = process.p_mean_log_variance(output, x_t, timesteps, kind)
    true_mean, _, true_log_variance = process.q_posterior(x0, x_t, timesteps)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance, bin_half_width=1 / 255)
    first = (timesteps == 0).view(-1, 1, 1, 1)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2.0)
