"""One-step distillation by distribution matching (DMD, arXiv:2311.18828), as PixArt-Sigma's authors train it.

A generator draws in one pass. What it draws is noised again, and two networks say what they see in it: the teacher (the
real distribution) and a copy that learns what the generator draws (the fake one). Their difference moves the generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.objectives.denoising import DenoisingObjective, LossOutput, size_inputs
from diffusion.objectives.targets import prediction_mse
from diffusion.process import keyed_normal, keyed_uniform, mean_square

# (latents drawn in one step, the teacher's), both (B, C, h, w) scaled -> (B,).
Distance = Callable[[Tensor, Tensor], Tensor]


class OneStepNetworks(nn.Module):
    """Generator and fake-score network as one module, which an optimiser and torch's wrappers take whole.

    forward(name, ...) calls the one of that name, "generator" or "fake".
    """

    def __init__(self, generator: Any, fake: Any) -> None:
        super().__init__()
        self.generator, self.fake = generator, fake

    @property
    def config(self) -> Any:
        """Of both networks."""
        return self.generator.config

    @property
    def y_embedder(self) -> nn.Module:
        return self.generator.y_embedder

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def compile_blocks(self, *, dynamic: bool | None = None) -> None:
        """See `PixArt.compile_blocks`."""
        for network in (self.generator, self.fake):
            network.compile_blocks(dynamic=dynamic)

    def forward(self, name: str, *inputs: Tensor, **named: Tensor) -> Tensor:
        output: Tensor = self.get_submodule(name)(*inputs, **named)
        return output


def pair_noise(keys: Sequence[str], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The noise that belongs to samples by their names, (B, *shape): a pair need not store it."""
    numbers = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little") for key in keys]
    return keyed_normal(0, "pair", torch.tensor(numbers, device=device), shape)


@dataclass
class DistributionMatching(DenoisingObjective):
    """Loss of the generator and of the fake-score network as one sum; each term has gradients in one of them alone.

    Args (beside those of `DenoisingObjective`):
        generator_timestep: at which the generator sees pure noise; drawing uses the same one.
        max_timestep: scores are compared at timesteps 1..max_timestep - 1.
        guidance_scale: of the teacher, uncond + scale (cond - uncond).
        regression_weight: of `distance`, for batches whose latents the teacher drew from `pair_noise`; 0 = none.
        distance: None = mean squared error of the latents.
        teacher: the real-score network; the trainer sets it.
    """

    generator_timestep: int = 400
    max_timestep: int = 950
    guidance_scale: float = 3.0
    regression_weight: float = 0.0
    distance: Distance | None = None
    teacher: nn.Module | None = None

    def draw_timesteps(self, seed: int, numbers: Tensor) -> Tensor:
        """(B,) timesteps at which the teacher and the fake network judge what was drawn."""
        return 1 + (keyed_uniform(seed, "score_timestep", numbers) * (self.max_timestep - 1)).long()

    def for_validation(self) -> DistributionMatching:
        """The same loss without caption dropout."""
        return replace(self, class_dropout_prob=0.0)

    def choices(self, batch: Any) -> Hashable | None:
        """The noise of pairs is made from names, on the host."""
        return None if self.regression_weight > 0 else super().choices(batch)

    def loss(self, model: nn.Module, batch: Any, seed: int) -> LossOutput:
        """One pass of each trained network with gradients; see `DenoisingObjective.loss` for the draws."""
        numbers, shape = batch.sample_numbers, batch.latents_mean.shape[1:]
        captions = self.drop_captions(
            model, batch, keyed_uniform(seed, "caption_drop", numbers) < self.class_dropout_prob
        )
        null = self.drop_captions(model, batch, torch.ones_like(numbers, dtype=torch.bool))
        sizes, process, kind = size_inputs(model, batch), self.process, self.prediction_type

        def output_of(network: Callable[..., Tensor], x: Tensor, t: Tensor, caption: tuple[Tensor, Tensor]) -> Tensor:
            return network(x, process.original_timesteps(t), *caption, **sizes)[:, : shape[0]].float()

        def x0_of(output: Tensor, x: Tensor, t: Tensor) -> Tensor:
            return process.x0_and_noise(output, x, t, kind)[0]

        paired = self.regression_weight > 0
        start = pair_noise(batch.keys, shape, numbers.device) if paired else keyed_normal(seed, "noise", numbers, shape)
        begin = torch.full_like(numbers, self.generator_timestep)
        drawn = x0_of(output_of(partial(model, "generator"), start, begin, captions), start, begin)
        still = drawn.detach()

        with torch.no_grad():
            t = self.draw_timesteps(seed, numbers)
            noisy = process.q_sample(still, t, keyed_normal(seed, "score_noise", numbers, shape))
            assert self.teacher is not None  # the trainer has set it
            conditional, unconditional = (output_of(self.teacher, noisy, t, caption) for caption in (captions, null))
            real = x0_of(unconditional + self.guidance_scale * (conditional - unconditional), noisy, t)
            fake = x0_of(output_of(partial(unwrapped(model), "fake"), noisy, t, captions), noisy, t)
            # Eq. 7-8: (s_fake - s_real) sigma / alpha = (fake - real) / sigma, over the distance from the real one.
            weight = 1 / ((still - real).abs().flatten(1).mean(1) + 1e-5).view(-1, 1, 1, 1)
            goal = still - weight * (fake - real) / process.gather("sqrt_one_minus_alpha_bar", t, noisy)
        matching = mean_square(drawn - goal)

        t = (keyed_uniform(seed, "fake_timestep", numbers) * process.num_timesteps).long()
        noise = keyed_normal(seed, "fake_noise", numbers, shape)
        found = output_of(partial(model, "fake"), process.q_sample(still, t, noise), t, captions)
        denoising = prediction_mse(found, process.target(still, t, noise, kind))

        metrics = {"matching": matching.detach(), "fake": denoising.detach()}
        total = matching + denoising
        if paired:
            teachers = batch.latents_mean * self.scale_factor
            regression = mean_square(drawn - teachers) if self.distance is None else self.distance(drawn, teachers)
            metrics["regression"] = regression.detach()
            total = total + self.regression_weight * regression
        return LossOutput(total.mean(), metrics)


def unwrapped(model: nn.Module) -> OneStepNetworks:
    """The networks inside torch's distributed wrapper, if there is one."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, OneStepNetworks)
    return inner
