"""SA-Solver (arXiv:2309.05019) under the import path that the original's README shows.

from diffusion.sa_solver_diffusers import SASolverScheduler
pipe.scheduler = SASolverScheduler.from_config(pipe.scheduler.config, algorithm_type="data_prediction",
    tau_func=lambda t: 1 if 200 <= t <= 800 else 0, predictor_order=2, corrector_order=2)
"""

from __future__ import annotations

import logging
from typing import Any

from diffusers.schedulers.scheduling_sasolver import SASolverScheduler as _SASolverScheduler

_logger = logging.getLogger(__name__)


def default_tau(timestep: float) -> int:
    """Stochasticity of the original: 1 in the middle of the process, 0 at its ends. Timesteps 0..999."""
    return 1 if 200 <= timestep <= 800 else 0


class SASolverScheduler(_SASolverScheduler):
    """diffusers' SA-Solver; its config stays serialisable when `tau_func` is a Python function.

    A function cannot be written to JSON, so the config records None, which means `default_tau` after loading.
    Another `tau_func` has to be passed again; saving says so once.
    """

    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**{**kwargs, "tau_func": None})

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write scheduler_config.json, with a notice when a `tau_func` of one's own is lost."""
        if any(self.tau_func(timestep) != default_tau(timestep) for timestep in range(1000)):
            _logger.warning("%s: tau_func cannot be saved; pass it again when loading", save_directory)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
