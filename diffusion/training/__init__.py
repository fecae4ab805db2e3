"""The trainer and what it is made of."""

from diffusion.training.building import build_network, denoising_objective
from diffusion.training.trainer import Reporting, Trainer

__all__ = ["Reporting", "Trainer", "build_network", "denoising_objective"]
