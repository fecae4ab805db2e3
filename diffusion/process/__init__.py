"""The noise process as pure tensor functions, and random draws as pure functions of the sample number."""

from diffusion.process.consistency import DDIMGrid, FlowGrid, boundary_scalings, mean_square, pseudo_huber
from diffusion.process.flow import StraightPath, keyed_sigmas
from diffusion.process.gaussian import IDDPM, GaussianProcess
from diffusion.process.randomness import keyed_integer, keyed_normal, keyed_uniform
from diffusion.process.schedules import NOISE_SCHEDULES, make_betas, spaced_timesteps
from diffusion.process.timesteps import LogitNormal, keyed_timesteps

__all__ = [
    "IDDPM",
    "NOISE_SCHEDULES",
    "DDIMGrid",
    "FlowGrid",
    "GaussianProcess",
    "LogitNormal",
    "StraightPath",
    "boundary_scalings",
    "keyed_integer",
    "keyed_normal",
    "keyed_sigmas",
    "keyed_timesteps",
    "keyed_uniform",
    "make_betas",
    "mean_square",
    "pseudo_huber",
    "spaced_timesteps",
]
