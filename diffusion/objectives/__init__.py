"""What one training step minimises."""

from diffusion.objectives.captions import drop_captions
from diffusion.objectives.denoising import (
    DenoisingObjective,
    LatentBatch,
    LossOutput,
    Objective,
    noise_mse,
    sample_posterior,
    variance_bound,
)

__all__ = [
    "DenoisingObjective",
    "LatentBatch",
    "LossOutput",
    "Objective",
    "drop_captions",
    "noise_mse",
    "sample_posterior",
    "variance_bound",
]
