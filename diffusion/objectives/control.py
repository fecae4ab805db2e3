"""ControlNet training: base training's loss, with a condition beside the captions (PixArt-delta, arXiv:2401.05252)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusion.objectives.denoising import DenoisingObjective

# (B, C, h, w) unscaled mean of pictures' latents -> mean and std of their conditions' latents.
ConditionOfLatents = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class ControlObjective(DenoisingObjective):
    """`DenoisingObjective` on a `ControlPixArt`.

    Args:
        make_condition: computes conditions of the pictures; None = the batch carries them.
    """

    make_condition: ConditionOfLatents | None = None

    def further_inputs(self, batch: Any, seed: int) -> dict[str, Tensor]:
        """The condition's latents, drawn from the VAE's posterior as the pictures' are."""
        mean, std = batch.control_mean, batch.control_std
        if self.make_condition is not None:
            mean, std = self.make_condition(batch.latents_mean)
        return {"control_latents": self.sample(mean, std, batch.sample_numbers, seed, "control_posterior")}
