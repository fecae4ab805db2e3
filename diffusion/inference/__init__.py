"""Sampling: the pipeline, solvers by name, pictures with recipes."""

from diffusion.inference.denoising import denoise, guide
from diffusion.inference.iddpm import IDDPMScheduler
from diffusion.inference.pipeline import PixArtOutput, PixArtPipeline
from diffusion.inference.recipe import model_fingerprint, read_recipe, save_png
from diffusion.inference.solvers import ALGORITHMS, DEFAULT_STEPS, make_scheduler

__all__ = [
    "ALGORITHMS",
    "DEFAULT_STEPS",
    "IDDPMScheduler",
    "PixArtOutput",
    "PixArtPipeline",
    "denoise",
    "guide",
    "make_scheduler",
    "model_fingerprint",
    "read_recipe",
    "save_png",
]
