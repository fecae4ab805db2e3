"""What one training step minimises."""

from diffusion.objectives.captions import drop_captions
from diffusion.objectives.consistency import ConsistencyObjective, Roles
from diffusion.objectives.control import ControlObjective
from diffusion.objectives.denoising import (
    DenoisingObjective,
    LatentBatch,
    LossOutput,
    Objective,
    noise_mse,
    sample_posterior,
    variance_bound,
)
from diffusion.objectives.distribution import DistributionMatching, OneStepNetworks, pair_noise

__all__ = [
    "ConsistencyObjective",
    "ControlObjective",
    "DenoisingObjective",
    "DistributionMatching",
    "LatentBatch",
    "LossOutput",
    "Objective",
    "OneStepNetworks",
    "Roles",
    "drop_captions",
    "noise_mse",
    "pair_noise",
    "sample_posterior",
    "variance_bound",
]
