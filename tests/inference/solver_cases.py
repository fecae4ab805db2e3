"""A small network, noise and captions for solvers: by the loop as it is written down, and by `SolverRun`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion.inference import make_scheduler
from diffusion.inference.conditions import Conditions
from diffusion.inference.denoising import denoise, guide
from diffusion.inference.solver_run import SolverRun
from diffusion.models import PixArt
from tests.tiny import TINY_TEXT_CHANNELS

CAPTURABLE = ("dpm-solver", "ddim", "deis", "lcm")
STEPS = {"lcm": 4}
ARGUMENTS = {"num_inference_steps": 3, "seed": 5, "output_type": "pt"}  # of a pipeline


def noise(pictures: int = 2) -> Tensor:
    return torch.randn(pictures, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def conditions(rows: int = 4) -> Conditions:
    embeds = torch.randn(rows, 9, TINY_TEXT_CHANNELS, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(9) < torch.tensor([[1], [1], [9], [5]])[:rows]
    return Conditions(embeds, mask)


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def plain(network: PixArt, algorithm: str, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The loop as it is written down: the network's forward at every step, guidance, solver."""
    given, count = conditions(), 2

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        inputs = torch.cat([latents, latents])
        output = network(inputs, timestep.float().expand(len(inputs)), given.embeds.to(dtype), given.mask)
        return guide(output.float(), 4, 4.5, keep_variance=False)

    return denoise(predict, make_scheduler(algorithm), noise(count), steps, generators=generators())


def by_run(network: Any, algorithm: str, steps: int, **options: Any) -> Tensor:
    run = SolverRun(network, make_scheduler(algorithm), steps, guided=True, **options)
    return run(run.tensors(noise(), conditions(), 4.5, None, generators()))
