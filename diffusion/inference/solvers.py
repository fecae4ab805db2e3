"""Solvers by name: diffusers schedulers, configured for PixArt's process."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from diffusion.errors import PromptError, did_you_mean
from diffusion.inference.iddpm import IDDPMScheduler
from diffusion.sa_solver_diffusers import SASolverScheduler

_logger = logging.getLogger(__name__)

PROCESS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
DEFAULT_STEPS = {"dpm-solver": 20, "sa-solver": 25, "iddpm": 100, "ddim": 50, "deis": 20, "lcm": 4}
ALGORITHMS = tuple(DEFAULT_STEPS)
_ALIASES = {"ddpm": "iddpm"}


class OriginalLCMScheduler(LCMScheduler):
    """diffusers' LCM scheduler on the original's timesteps: every (50 // n)-th of the distillation grid.

    diffusers now spreads them evenly instead (4 steps: 999, 759, 499, 259; the original's: 999, 759, 519, 279).
    """

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **kwargs: Any
    ) -> None:
        """As in diffusers; `num_inference_steps` alone gives the original's timesteps.

        Raises:
            PromptError: more steps than the distillation grid has.
        """
        if num_inference_steps is None or kwargs:
            super().set_timesteps(num_inference_steps, device=device, **kwargs)
            return
        grid_size = self.config["original_inference_steps"]
        if num_inference_steps > grid_size:
            raise PromptError(f"num_inference_steps={num_inference_steps} must be at most {grid_size} with solver lcm")
        spacing = self.config["num_train_timesteps"] // grid_size
        grid = [k * spacing - 1 for k in range(grid_size, 0, -1)]
        super().set_timesteps(timesteps=grid[:: grid_size // num_inference_steps][:num_inference_steps], device=device)


class OneStepScheduler(LCMScheduler):
    """One step from pure noise at a timestep to the predicted picture, for generators distilled by DMD."""

    one_step_timestep = 400

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **kwargs: Any
    ) -> None:
        """`one_step_timestep`, whatever is asked for.

        Raises:
            PromptError: another number of steps than 1.
        """
        if num_inference_steps != 1:
            raise PromptError(f"num_inference_steps={num_inference_steps} must be 1 with a generator of one step")
        self.num_inference_steps = 1  # type: ignore[assignment]
        self.timesteps = torch.tensor([self.one_step_timestep], device=device)
        self._step_index = None


_SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm-solver": (
        DPMSolverMultistepScheduler,
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",  # the original calls it "dpmsolver"
            "lower_order_final": True,
            "timestep_spacing": "linspace",
        },
    ),
    "sa-solver": (
        SASolverScheduler,
        {
            "algorithm_type": "data_prediction",
            "predictor_order": 2,
            "corrector_order": 2,
            "lower_order_final": True,
            "timestep_spacing": "linspace",
        },
    ),
    "iddpm": (IDDPMScheduler, {}),
    # "trailing" starts at 999 and lands on 0 exactly: DDIM's stride is T // n, which "linspace" does not keep.
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}),
    "deis": (
        DEISMultistepScheduler,
        {"solver_order": 2, "lower_order_final": True, "timestep_spacing": "linspace"},
    ),
    "lcm": (OriginalLCMScheduler, {"original_inference_steps": 50, "clip_sample": False, "set_alpha_to_one": True}),
}


def algorithm_name(algorithm: str) -> str:
    """The canonical name of a solver ("ddpm" is "iddpm").

    Raises:
        PromptError: unknown, with the nearest valid name.
    """
    name = _ALIASES.get(algorithm, algorithm)
    if name not in _SOLVERS:
        raise PromptError(f"algorithm={algorithm!r} is unknown; {did_you_mean(algorithm, [*ALGORITHMS, *_ALIASES])}")
    return name


def make_scheduler(algorithm: str, *, base_config: Mapping[str, Any] | None = None) -> Any:
    """A fresh scheduler.

    "dpm-solver": DPM-Solver++ 2M (arXiv:2211.01095), uniform in time; "sa-solver": SA-Solver (arXiv:2309.05019),
    stochastic for 200 <= t <= 800; "iddpm" or "ddpm": ancestral with the learned variance; "ddim"; "deis"
    (arXiv:2204.13902); "lcm": for distilled models (arXiv:2310.04378).

    Args:
        base_config: config of another scheduler, whose noise process (betas, prediction type) is kept; None = PixArt's.
    Raises:
        PromptError: unknown name.
    """
    cls, settings = _SOLVERS[algorithm_name(algorithm)]
    process = PROCESS if base_config is None else {key: base_config.get(key, PROCESS[key]) for key in PROCESS}
    return cls(**process, **settings)


def make_one_step_scheduler(timestep: int) -> OneStepScheduler:
    """For a generator that was trained to see pure noise at `timestep`."""
    scheduler = OneStepScheduler(**PROCESS, clip_sample=False, set_alpha_to_one=True)
    scheduler.one_step_timestep = timestep
    return scheduler


def solver_name(scheduler: Any) -> str:
    """The name of a scheduler's algorithm, for the recipe of a picture; a class without one gives its own name."""
    for name, (cls, _) in _SOLVERS.items():
        if any(parent.__name__ == cls.__name__.removeprefix("Original") for parent in type(scheduler).__mro__):
            return name
    return type(scheduler).__name__


def stock_scheduler(scheduler: Any) -> Any:
    """The scheduler as a class of diffusers itself, so that a folder opens without this package."""
    for cls in type(scheduler).__mro__:
        if cls.__module__.startswith("diffusers.schedulers.") and hasattr(cls, "from_config"):
            return scheduler if cls is type(scheduler) else cls.from_config(scheduler.config)
    _logger.warning("diffusers has no %s; the folder gets the nearest, DDPMScheduler", type(scheduler).__name__)
    process = {key: scheduler.config[key] for key in PROCESS}
    return DDPMScheduler(**process, variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing")


def accepts_generator(scheduler: Any) -> bool:
    """Whether a scheduler's step draws noise from given generators."""
    return "generator" in inspect.signature(scheduler.step).parameters


def takes_variance(scheduler: Any) -> bool:
    """Whether a scheduler reads the variance channels of the network's output."""
    return isinstance(scheduler, IDDPMScheduler)
