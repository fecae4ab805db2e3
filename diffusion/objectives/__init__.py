"""What one training step minimises."""

from diffusion.objectives.captions import drop_captions
from diffusion.objectives.classes import ClassDenoisingObjective
from diffusion.objectives.denoising import (
    DenoisingObjective,
    LatentBatch,
    LossOutput,
    Objective,
    noise_mse,
    sample_posterior,
    variance_bound,
)
from diffusion.objectives.levers import Alignment, Routing
from diffusion.objectives.targets import FlowObjective, VelocityObjective

__all__ = [
    "Alignment",
    "ClassDenoisingObjective",
    "DenoisingObjective",
    "FlowObjective",
    "LatentBatch",
    "LossOutput",
    "Objective",
    "Routing",
    "VelocityObjective",
    "drop_captions",
    "noise_mse",
    "sample_posterior",
    "variance_bound",
]
