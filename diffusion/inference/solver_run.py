"""One run of a solver as a function of tensors alone, which may be recorded and run again on others."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.inference.conditions import Conditions
from diffusion.inference.denoising import OnStep, Start, draw_step_noise, integrate
from diffusion.inference.guided import Guidance, GuidedPrediction
from diffusion.inference.shortcuts import Shortcuts
from diffusion.inference.solvers import takes_variance
from diffusion.models import ControlPixArt, PixArt

_SIZES = ("img_hw", "aspect_ratio")


@dataclass(frozen=True)
class SolverRun:
    """Network, solver and settings; called with the dict that `tensors` makes, gives latents (B, C, h, w).

    Args:
        steps, first_step: of the solver, and those left out at the beginning.
        guided: with classifier-free guidance; its scale is a tensor among the others.
        guided_channels, condition_strength: see `Guidance`.
        alone: see `Conditions`. embeds_time_ahead: see `GuidedPrediction`.
        shortcuts: lossy savings; they need embeds_time_ahead.
    """

    network: PixArt | ControlPixArt
    scheduler: Any
    steps: int
    first_step: int = 0
    guided: bool = False
    guided_channels: int | None = None
    condition_strength: float = 1.0
    alone: int = 0
    embeds_time_ahead: bool = False
    shortcuts: Shortcuts | None = None

    @property
    def key(self) -> Hashable:
        """All that decides what is computed, beside the tensors and the weights."""
        config = json.dumps(dict(self.scheduler.config), sort_keys=True, default=str)
        solver = (type(self.scheduler), config, getattr(self.scheduler, "one_step_timestep", None))
        guidance = (self.guided, self.guided_channels, self.condition_strength, self.alone)
        return (id(self.network), solver, self.steps, self.first_step, guidance, self.shortcuts)

    def tensors(
        self,
        noise: Tensor,
        conditions: Conditions,
        guidance_scale: float,
        start: Tensor | None,
        generators: list[torch.Generator],
    ) -> dict[str, Tensor]:
        """What a run reads: noise and start (B, C, h, w) (None = noise alone), conditions, the solver's noise."""
        found = {
            "noise": noise,
            "embeds": conditions.embeds,
            "mask": conditions.mask,
            "guidance_scale": torch.full((), guidance_scale, device=noise.device),
            "control": conditions.control,
            "start": start,
            "step_noise": draw_step_noise(self.scheduler, noise, self.steps - self.first_step, generators),
            **conditions.sizes,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        generators: list[torch.Generator] | None = None,
        on_step: OnStep | None = None,
        stop: Callable[[], bool] | None = None,
        unconditional: Callable[[], Tensor | None] = lambda: None,
    ) -> Tensor:
        """Noise to latents; see `integrate`.

        unconditional: gives the latents that the unconditional half sees instead, before each step.
        """
        sizes = {name: tensors[name] for name in _SIZES if name in tensors}
        conditions = Conditions(tensors["embeds"], tensors["mask"], sizes, tensors.get("control"), self.alone)
        guidance = Guidance(
            tensors["guidance_scale"] if self.guided else None,
            self.guided_channels,
            takes_variance(self.scheduler),
            self.condition_strength,
        )
        self.scheduler.set_timesteps(self.steps)
        timesteps = self.scheduler.timesteps[self.first_step :] if self.embeds_time_ahead else ()
        predict = GuidedPrediction(
            self.network, conditions, guidance, timesteps=list(timesteps), shortcuts=self.shortcuts
        )
        return integrate(
            lambda latents, timestep: predict(latents, timestep, unconditional=unconditional()),
            self.scheduler,
            tensors["noise"],
            self.steps,
            generators=generators,
            on_step=on_step,
            start=Start(tensors["start"], self.first_step) if "start" in tensors else None,
            stop=stop,
            step_noise=list(tensors.get("step_noise", ())),
        )
