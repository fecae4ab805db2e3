"""Solvers by name: diffusers schedulers, configured for PixArt's process."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from diffusers.schedulers.scheduling_lcm import LCMScheduler, LCMSchedulerOutput
from torch import Tensor

from diffusion.checkpoints.keys import flow_shift_of, predicts
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
FLOW_EULER = "flow-euler"
ALGORITHMS = ("dpm-solver", "sa-solver", "iddpm", "ddim", "deis", "lcm")  # for models that predict noise or velocity
FLOW_ALGORITHMS = ("dpm-solver", FLOW_EULER)  # for rectified flow; deis misses the mean of shifted ones by 6 %
# "lcm" is for distilled models of any kind.
DEFAULT_STEPS = {"dpm-solver": 20, "sa-solver": 25, "iddpm": 100, "ddim": 50, "deis": 20, "lcm": 4, FLOW_EULER: 28}
_CAPTURABLE = ("dpm-solver", "ddim", "deis", FLOW_EULER)
_ALIASES = {"ddpm": "iddpm"}


class _NoiseFromOutside(LCMScheduler):
    """diffusers' LCM scheduler, whose steps may be given their noise instead of generators."""

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
    ) -> Any:
        """As in diffusers, with `noise` (B, C, h, w) in place of what the generators give."""
        if noise is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        if self.step_index is None:
            self._init_step_index(timestep)
        step: Any = self.step_index
        steps: Any = self.num_inference_steps
        self.num_inference_steps = step + 1  # type: ignore[assignment]  # the last step adds no noise
        denoised = super().step(model_output, timestep, sample, return_dict=False)[1]
        self.num_inference_steps = steps
        alpha_bar = self.alphas_cumprod[self.timesteps[step + 1]]
        previous = alpha_bar.sqrt() * denoised + (1 - alpha_bar).sqrt() * noise
        return LCMSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)


class OriginalLCMScheduler(_NoiseFromOutside):
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


class FlowLCMScheduler(FlowMatchLCMScheduler):
    """diffusers' LCM scheduler of flow models at noise levels 1, (n - 1) / n, ... 1 / n before the shift.

    diffusers' own end at 1 / 1000, where the last of a few steps would do nothing.
    """

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **kwargs: Any
    ) -> None:
        """As in diffusers; `num_inference_steps` alone gives even steps to 0."""
        if num_inference_steps is not None and not kwargs:
            kwargs = {"sigmas": [1 - k / num_inference_steps for k in range(num_inference_steps)]}
        super().set_timesteps(num_inference_steps, device=device, **kwargs)  # type: ignore[misc]


class OneStepScheduler(_NoiseFromOutside):
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
_FLOW_MATCH: dict[str, Any] = {FLOW_EULER: FlowMatchEulerDiscreteScheduler, "lcm": FlowLCMScheduler}


def algorithm_name(algorithm: str) -> str:
    """The canonical name of a solver ("ddpm" is "iddpm").

    Raises:
        PromptError: unknown, with the nearest valid name.
    """
    name = _ALIASES.get(algorithm, algorithm)
    if name not in DEFAULT_STEPS:
        raise PromptError(f"algorithm={algorithm!r} is unknown; {did_you_mean(algorithm, [*DEFAULT_STEPS, *_ALIASES])}")
    return name


def make_scheduler(
    algorithm: str,
    *,
    base_config: Mapping[str, Any] | None = None,
    prediction_type: str | None = None,
    flow_shift: float | None = None,
) -> Any:
    """A fresh scheduler.

    "dpm-solver": DPM-Solver++ 2M (arXiv:2211.01095), uniform in time; "sa-solver": SA-Solver (arXiv:2309.05019),
    stochastic for 200 <= t <= 800; "iddpm" or "ddpm": ancestral with the learned variance; "ddim"; "deis"
    (arXiv:2204.13902); "lcm": for distilled models (arXiv:2310.04378); "flow-euler": Euler steps of rectified flow.

    Args:
        base_config: config of another scheduler, whose noise process (betas, prediction type) is kept; None = PixArt's.
        prediction_type: "epsilon", "v_prediction" or "flow", of the network; None = that of base_config.
        flow_shift: of a flow model; None = that of base_config.
    Raises:
        PromptError: unknown name, or a solver that cannot sample what the network predicts.
    """
    name, base = algorithm_name(algorithm), base_config or {}
    prediction_type = prediction_type or ("flow" if name == FLOW_EULER else predicts(base))
    if prediction_type == "flow":
        return _flow_scheduler(name, base, flow_shift_of(base) if flow_shift is None else flow_shift)
    if name == FLOW_EULER:
        raise PromptError(f"solver {name} samples flow models; this one predicts {prediction_type}: use dpm-solver")
    cls, settings = _SOLVERS[name]
    process = {key: base.get(key, value) for key, value in PROCESS.items()}
    return cls(**{**process, "prediction_type": prediction_type}, **settings)


def scheduler_predicts(scheduler: Any) -> str:
    """What the network predicts that a scheduler samples: "epsilon", "v_prediction" or "flow"."""
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)):
        return "flow"
    return predicts(scheduler.config)


def fitting_scheduler(scheduler: Any, prediction_type: str, flow_shift: float = 1.0) -> Any:
    """The scheduler itself, or the same solver for a network that predicts something else than it is set up for.

    Raises:
        PromptError: the solver cannot sample it.
    """
    given = scheduler_predicts(scheduler)
    if given == prediction_type:
        return scheduler
    name = solver_name(scheduler)
    if name not in DEFAULT_STEPS:
        raise PromptError(
            f"{name} is set up for {given}, the network predicts {prediction_type}; choose an algorithm, as dpm-solver"
        )
    _logger.info("the network predicts %s: %s is set up for it", prediction_type, name)
    return make_scheduler(name, base_config=scheduler.config, prediction_type=prediction_type, flow_shift=flow_shift)


def _flow_scheduler(name: str, base: Mapping[str, Any], shift: float) -> Any:
    steps = base.get("num_train_timesteps", PROCESS["num_train_timesteps"])
    if name in _FLOW_MATCH:
        return _FLOW_MATCH[name](num_train_timesteps=steps, shift=base.get("shift", shift))
    if name not in FLOW_ALGORITHMS:
        raise PromptError(f"solver {name} cannot sample a flow model; choose one of {', '.join(FLOW_ALGORITHMS)}")
    cls, settings = _SOLVERS[name]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return cls(**{**PROCESS, "num_train_timesteps": steps, **settings, **flow})


def make_one_step_scheduler(timestep: int, prediction_type: str = "epsilon") -> OneStepScheduler:
    """For a generator that was trained to see pure noise at `timestep`, and predicts noise or "v_prediction"."""
    process = {**PROCESS, "prediction_type": prediction_type}
    scheduler = OneStepScheduler(**process, clip_sample=False, set_alpha_to_one=True)
    scheduler.one_step_timestep = timestep
    return scheduler


def solver_name(scheduler: Any) -> str:
    """The name of a scheduler's algorithm, for the recipe of a picture; a class without one gives its own name."""
    if isinstance(scheduler, FlowMatchLCMScheduler):
        return "lcm"
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FLOW_EULER
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


def takes_noise(scheduler: Any) -> bool:
    """Whether a scheduler's step can be given its noise (see `draw_step_noise`)."""
    return isinstance(scheduler, _NoiseFromOutside)


def is_capturable(scheduler: Any) -> bool:
    """Whether the steps neither draw random numbers nor read the device: then they fit into a CUDA graph."""
    config, name = scheduler.config, solver_name(scheduler)
    draws = "sde" in str(config.get("algorithm_type")) or config.get("stochastic_sampling")
    return takes_noise(scheduler) or (name in _CAPTURABLE and not draws)
