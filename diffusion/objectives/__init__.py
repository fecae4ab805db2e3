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
    noise_mse,
    sample_posterior,
    variance_bound,
)
from diffusion.objectives.distribution import DistributionMatching, OneStepNetworks, pair_noise
from diffusion.objectives.levers import Alignment, Routing
from diffusion.objectives.targets import FlowObjective, VelocityObjective

__all__ = [
    "Alignment",
    "ClassDenoisingObjective",
    "ConsistencyObjective",
    "ControlObjective",
    "DenoisingObjective",
    "DistributionMatching",
    "FlowObjective",
    "LatentBatch",
    "LossOutput",
    "Objective",
    "OneStepNetworks",
    "Roles",
    "Routing",
    "VelocityObjective",
    "drop_captions",
    "noise_mse",
    "pair_noise",
    "sample_posterior",
    "variance_bound",
]
