"""What one training step minimises."""

from diffusion.objectives.captions import drop_captions
from diffusion.objectives.classes import ClassDenoisingObjective
from diffusion.objectives.consistency import ConsistencyObjective, Roles
from diffusion.objectives.control import ControlObjective
from diffusion.objectives.denoising import (
    DenoisingObjective,
    LatentBatch,
    LossOutput,
    Objective,
    sample_posterior,
)
from diffusion.objectives.distribution import DistributionMatching, OneStepNetworks, pair_noise
from diffusion.objectives.levers import Alignment, Routing
from diffusion.objectives.targets import prediction_mse, variance_bound

__all__ = [
    "Alignment",
    "ClassDenoisingObjective",
    "ConsistencyObjective",
    "ControlObjective",
    "DenoisingObjective",
    "DistributionMatching",
    "LatentBatch",
    "LossOutput",
    "Objective",
    "OneStepNetworks",
    "Roles",
    "Routing",
    "drop_captions",
    "pair_noise",
    "prediction_mse",
    "sample_posterior",
    "variance_bound",
]
