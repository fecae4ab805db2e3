"""Latent consistency distillation: one step of the teacher's guided ODE must not change what the student predicts.

LCM (arXiv:2310.04378), Algorithm 1, as PixArt-delta (arXiv:2401.05252) trains it: the guidance is distilled into the
student, which has no guidance embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from diffusion.objectives.denoising import DenoisingObjective, LatentBatch, LossOutput, predict
from diffusion.process import (
    DDIMGrid,
    keyed_normal,
    keyed_timesteps,
    keyed_uniform,
    mean_square,
    pseudo_huber,
)


@dataclass
class Roles:
    """The networks around the student: each is called like it, without gradients.

    Args:
        teacher: the model that is distilled.
        target: gives what the student is compared with: the student's average, or the student itself.
        as_teacher: entered while the teacher predicts (an adapter is switched off in it).
    """

    teacher: nn.Module
    target: nn.Module
    as_teacher: Callable[[], contextlib.AbstractContextManager[object]] = field(default=contextlib.nullcontext)


@dataclass
class ConsistencyObjective(DenoisingObjective):
    """Distance between the student at t_n and the target one DDIM step of the guided teacher later.

    Args (beside those of `DenoisingObjective`):
        num_ddim_steps: steps of the teacher's grid.
        guidance: w of Eq. 14, uncond + (1 + w) (cond - uncond): (w, w) fixed, or the ends of a range that it is drawn
            from uniformly, a value a sample.
        huber_c: constant of the pseudo-Huber distance; None = squared distance.
        roles: teacher and target; the trainer sets them before the first step.
    """

    num_ddim_steps: int = 50
    guidance: tuple[float, float] = (4.5, 4.5)
    huber_c: float | None = 0.001
    roles: Roles | None = None

    def __post_init__(self) -> None:
        self.grid = DDIMGrid(self.process, self.num_ddim_steps)

    def for_validation(self) -> ConsistencyObjective:
        """The same distance without caption dropout."""
        return replace(self, class_dropout_prob=0.0)

    def loss(self, model: nn.Module, batch: LatentBatch, seed: int) -> LossOutput:
        """One pass of the student with gradients, three without; see `DenoisingObjective.loss` for the draws."""
        assert self.roles is not None  # the trainer has set them
        roles, numbers = self.roles, batch.sample_numbers
        latents = self.sample(batch.latents_mean, batch.latents_std, numbers, seed, "posterior")
        noise = keyed_normal(seed, "noise", numbers, latents.shape[1:])
        begin, end = self.grid.interval(keyed_timesteps(seed, numbers, self.num_ddim_steps))
        low, high = self.guidance
        guidance = low + (high - low) * keyed_uniform(seed, "guidance", numbers)
        captions = self.drop_captions(
            model, batch, keyed_uniform(seed, "caption_drop", numbers) < self.class_dropout_prob
        )
        null = self.drop_captions(model, batch, torch.ones_like(numbers, dtype=torch.bool))
        noisy = self.process.q_sample(latents, begin, noise)

        def noise_of(network: nn.Module, x: Tensor, timesteps: Tensor, caption: tuple[Tensor, Tensor]) -> Tensor:
            output = predict(network, x, self.process.original_timesteps(timesteps), *caption, batch)
            return output[:, : x.shape[1]].float()  # float32: at t = 999 the conversion to x_0 multiplies by 157

        student = self.grid.consistency(noisy, noise_of(model, noisy, begin, captions), begin)
        with torch.no_grad():
            with roles.as_teacher():
                conditional = noise_of(roles.teacher, noisy, begin, captions)
                unconditional = noise_of(roles.teacher, noisy, begin, null)
            guided = conditional + guidance.view(-1, 1, 1, 1) * (conditional - unconditional)
            earlier = self.grid.step(noisy, guided, begin, end)
            target = self.grid.consistency(earlier, noise_of(roles.target, earlier, end, captions), end)
        difference = student - target
        distance = mean_square(difference) if self.huber_c is None else pseudo_huber(difference, self.huber_c)
        return LossOutput(distance.mean(), {"distance": distance.detach()})
