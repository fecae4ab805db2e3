"""The trainer and what it is made of."""

from diffusion.training.building import build_network, denoising_objective
from diffusion.training.doctor import check_up
from diffusion.training.replay import replay_step
from diffusion.training.reports import Reporting
from diffusion.training.trainer import Trainer

__all__ = ["Reporting", "Trainer", "build_network", "check_up", "denoising_objective", "replay_step"]
