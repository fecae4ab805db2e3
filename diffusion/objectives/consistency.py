"""Latent consistency distillation: one step of the teacher's guided ODE must not change what the student predicts.

LCM (arXiv:2310.04378), Algorithm 1, as PixArt-delta (arXiv:2401.05252) trains it: the guidance is distilled into the
student, which has no guidance embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion.objectives.denoising import DenoisingObjective, LatentBatch, LossOutput, predict, unwrap
from diffusion.process import (
    DDIMGrid,
    FlowGrid,
    StraightPath,
    keyed_normal,
    keyed_timesteps,
    keyed_uniform,
    mean_square,
    pseudo_huber,
)


@dataclass
class Roles:
    """The networks around the student: each is called like it, without gradients. None = the student itself.

    Args:
        teacher: the model that is distilled.
        target: gives what the student is compared with: the student's average, or the student itself.
        as_teacher: called with the teacher, and entered while that predicts (its adapter is switched off).
    """

    teacher: nn.Module | None
    target: nn.Module | None
    as_teacher: Callable[[nn.Module], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@dataclass
class ConsistencyObjective(DenoisingObjective):
    """Distance between the student at t_n and the target one DDIM step of the guided teacher later.

    Args (beside those of `DenoisingObjective`):
        num_ddim_steps: steps of the teacher's grid; of Euler's method for a flow model.
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
        path = self.path
        self.grid: DDIMGrid | FlowGrid = (
            FlowGrid(path, self.num_ddim_steps, self.flow_shift)
            if isinstance(path, StraightPath)
            else DDIMGrid(path, self.num_ddim_steps)
        )

    def draw_timesteps(self, seed: int, numbers: Tensor) -> Tensor:
        """(B,) timesteps at which the student's steps begin."""
        return self.grid.interval(keyed_timesteps(seed, numbers, self.num_ddim_steps))[0]

    def for_validation(self) -> ConsistencyObjective:
        """The same distance without caption dropout."""
        return replace(self, class_dropout_prob=0.0)

    def loss(self, model: nn.Module, batch: LatentBatch, seed: int) -> LossOutput:
        """One pass of the student with gradients, three without; see `DenoisingObjective.loss` for the draws."""
        assert self.roles is not None  # the trainer has set them
        roles, numbers = self.roles, batch.sample_numbers
        teacher, target = (unwrap(model) if role is None else role for role in (roles.teacher, roles.target))
        latents = self.sample(batch.latents_mean, batch.latents_std, numbers, seed, "posterior")
        noise = keyed_normal(seed, "noise", numbers, latents.shape[1:])
        begin, end = self.grid.interval(keyed_timesteps(seed, numbers, self.num_ddim_steps))
        low, high = self.guidance
        guidance = low + (high - low) * keyed_uniform(seed, "guidance", numbers)
        captions = self.drop_captions(
            model, batch, keyed_uniform(seed, "caption_drop", numbers) < self.class_dropout_prob
        )
        null = self.drop_captions(model, batch, torch.ones_like(numbers, dtype=torch.bool))
        path = self.path
        noisy = path.q_sample(latents, begin, noise)

        def output_of(network: nn.Module, x: Tensor, timesteps: Tensor, caption: tuple[Tensor, Tensor]) -> Tensor:
            output = predict(network, x, path.original_timesteps(timesteps), *caption, batch)
            return output[:, : x.shape[1]].float()  # float32: at t = 999 noise is 157 times as large in x_0

        def implied(output: Tensor, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            return path.x0_and_noise(output, x, timesteps, self.prediction_type)

        x0, _ = implied(output_of(model, noisy, begin, captions), noisy, begin)
        student = self.grid.consistency(noisy, x0, begin)
        with torch.no_grad():
            with roles.as_teacher(teacher):
                conditional = output_of(teacher, noisy, begin, captions)
                unconditional = output_of(teacher, noisy, begin, null)
            guided = conditional + guidance.view(-1, 1, 1, 1) * (conditional - unconditional)
            earlier = self.grid.step(*implied(guided, noisy, begin), end)
            x0, _ = implied(output_of(target, earlier, end, captions), earlier, end)
            goal = self.grid.consistency(earlier, x0, end)
        difference = student - goal
        distance = mean_square(difference) if self.huber_c is None else pseudo_huber(difference, self.huber_c)
        return LossOutput(distance.mean(), {"distance": distance.detach()})
