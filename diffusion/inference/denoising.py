"""The solver loop and guidance, as functions that know no network. Legend: B pictures, C latent channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion.errors import NumericalError, PromptError
from diffusion.inference.solvers import accepts_generator, scheduler_predicts, takes_noise

Prediction = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor], Tensor]
EMBEDDED, DENOISED = "the caption embeddings", "the denoised latents"  # names of stages, for `require_finite`


@dataclass(frozen=True)
class Start:
    """A known picture to begin from, instead of noise alone.

    latents: (B, C, h, w) scaled, without noise. first_step: steps of the solver that are left out; all of them
    gives `latents` back.
    """

    latents: Tensor
    first_step: int


def denoise(predict: Prediction, scheduler: Any, noise: Tensor, num_inference_steps: int, **options: Any) -> Tensor:
    """`integrate`, and a look at the result.

    Raises:
        NumericalError: it is not finite.
    """
    return require_finite(integrate(predict, scheduler, noise, num_inference_steps, **options), DENOISED)


def integrate(
    predict: Prediction,
    scheduler: Any,
    noise: Tensor,
    num_inference_steps: int,
    *,
    generators: list[torch.Generator] | None = None,
    on_step: OnStep | None = None,
    start: Start | None = None,
    stop: Callable[[], bool] | None = None,
    step_noise: Sequence[Tensor] = (),
) -> Tensor:
    """Integrate from noise to latents.

    Timesteps and the solver's coefficients stay on the CPU, so that no step waits for the device.

    Args:
        predict: (x_t (B, C, h, w), timestep () on the original scale, on the CPU) -> noise (B, C, h, w), or
            (B, 2C, h, w) with variance for solvers that take it.
        scheduler: a diffusers scheduler; its timesteps are set here.
        noise: (B, C, h, w) of N(0, 1); its dtype (float32) and device are kept throughout.
        generators: one a picture, for solvers that draw noise at every step.
        on_step: called with (step index, timestep, latents) after each step; returns the latents to go on with.
        start: begin from a picture under `noise` (SDEdit, arXiv:2108.01073).
        stop: asked after each step whether to end here.
        step_noise: of `draw_step_noise`, for solvers that take it so.
    Returns:
        (B, C, h, w) scaled latents.
    """
    scheduler.set_timesteps(num_inference_steps)
    first = 0 if start is None else start.first_step
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    extra = {"generator": generators} if accepts_generator(scheduler) else {}
    timesteps = scheduler.timesteps[first:]
    if start is None or first == 0:  # the whole process begins with noise alone, whatever the picture
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        latents = noised(scheduler, start.latents, noise, timesteps[0] if len(timesteps) else None)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)  # Euler for flow has neither
    for index, timestep in enumerate(timesteps, start=first):
        prediction = predict(scaled(latents, timestep), timestep)
        given = {"noise": step_noise[index - first]} if index - first < len(step_noise) else extra
        latents = scheduler.step(prediction, timestep, latents, **given, return_dict=False)[0]
        if on_step is not None:
            latents = on_step(index, timestep, latents)
        if stop is not None and stop():
            break
    return latents


def draw_step_noise(
    scheduler: Any, noise: Tensor, num_steps: int, generators: list[torch.Generator] | None
) -> Tensor | None:
    """(num_steps - 1, B, C, h, w): what a solver adds between steps, drawn ahead; None for those that take none."""
    if not takes_noise(scheduler) or num_steps < 2:
        return None
    drawn = [
        randn_tensor(noise.shape, generator=generators, device=noise.device, dtype=noise.dtype)
        for _ in range(num_steps - 1)
    ]
    return torch.stack(drawn)


def noised(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor | None) -> Tensor:
    """q(x_t | x_0) of DDPM Eq. 4, or of a straight path: latents, noise (B, C, h, w) -> (B, C, h, w).

    timestep None = no noise.
    """
    if timestep is None:
        return latents
    if scheduler_predicts(scheduler) == "flow":
        sigma = timestep.to(latents.dtype) / scheduler.config["num_train_timesteps"]
        return (1 - sigma) * latents + sigma * noise
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(latents.dtype)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def guide(
    output: Tensor, channels: int, scale: float | Tensor, *, keep_variance: bool, guided_channels: int | None = None
) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598): uncond + scale * (cond - uncond).

    Args:
        output: (2B, C or 2C, h, w), the unconditional half first.
        channels: C.
        keep_variance: append the variance channels of the conditional half, unguided.
        guided_channels: of the C noise channels; None = all, 3 = as the original's IDDPM sampler, which takes the
            others from the conditional half.
    Returns:
        (B, C or 2C, h, w).
    """
    unconditional, conditional = output.chunk(2)
    guided = channels if guided_channels is None else guided_channels
    noise = unconditional[:, :guided] + scale * (conditional[:, :guided] - unconditional[:, :guided])
    return torch.cat([noise, conditional[:, guided:] if keep_variance else conditional[:, guided:channels]], dim=1)


def picture_generators(
    count: int, seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> tuple[list[torch.Generator], list[int] | None]:
    """One generator a picture, so that a picture does not depend on its batch, and the seeds they were made from.

    Args:
        seed: seed, seed + 1, ...; a list as it is; None = drawn from torch's global generator.
        generator: instead of seed, one a picture, or one for all, from which they draw in turn, so that on a CPU the
            noise is that of stock diffusers; the seeds are then None.
    Raises:
        PromptError: another number of seeds or generators than pictures, both given, no generators, or a seed that is
            no integer in 0..2^63 - 1.
    """
    if generator is not None:
        generators = [generator] * count if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, Sequence) or not all(isinstance(each, torch.Generator) for each in generators):
            raise PromptError(
                f"generator={generator!r} must be a torch.Generator or a list of them; seed is for numbers"
            )
        if seed is not None:
            raise PromptError("seed and generator are both given; give one of them")
        if len(generators) != count:
            raise PromptError(f"generator has {len(generators)} entries for {count} pictures; give one each, or a seed")
        return list(generators), None
    if seed is None:
        seed = torch.randint(2**31, (count,)).tolist()
    seeds = list(range(seed, seed + count)) if isinstance(seed, int) and not isinstance(seed, bool) else seed
    if not isinstance(seeds, Sequence) or any(isinstance(value, bool) or not isinstance(value, int) for value in seeds):
        raise PromptError(f"seed={seed!r} must be an integer or a list of integers")
    if any(not 0 <= value < 2**63 for value in seeds):
        raise PromptError(f"seed={seed!r} must lie in 0..2^63 - 1")
    if len(seeds) != count:
        raise PromptError(f"seed has {len(seeds)} values for {count} pictures; give one each, or a single seed")
    return [torch.Generator().manual_seed(value) for value in seeds], list(seeds)


def initial_noise(
    count: int, shape: tuple[int, int, int], generators: list[torch.Generator], device: torch.device
) -> Tensor:
    """(count, *shape) float32 of N(0, 1), picture by picture as stock diffusers draws one; CPU generators give the
    same noise on every device."""
    return randn_tensor((count, *shape), generator=generators, device=device, dtype=torch.float32)


def require_finite(values: Tensor, stage: str) -> Tensor:
    """The values themselves.

    Raises:
        NumericalError: some are NaN or infinite; names the stage.
    """
    if not torch.isfinite(values).all():
        bad = (~torch.isfinite(values)).sum().item()
        raise NumericalError(
            f"{stage} are not finite ({bad} of {values.numel()} values); use float32 or bfloat16 instead of float16, "
            "or check the model's weights"
        )
    return values
