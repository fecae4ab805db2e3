"""Noise schedules and respacing of the timesteps they are sampled at."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion.errors import ConfigError, did_you_mean

NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")


def make_betas(noise_schedule: str, num_timesteps: int = 1000) -> Tensor:
    """Betas of a noise schedule, (num_timesteps,) float64.

    "linear": DDPM (arXiv:2006.11239, Sec. 4), endpoints scaled so that any number of steps ends equally noisy.
    "squaredcos_cap_v2": Improved DDPM, Eq. 17 (arXiv:2102.09672).

    Raises:
        ConfigError: unknown schedule name.
    """
    if noise_schedule == "linear":
        scale = 1000 / num_timesteps
        return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    if noise_schedule == "squaredcos_cap_v2":

        def alpha_bar(fraction: float) -> float:
            return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [
            min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), 0.999)
            for i in range(num_timesteps)
        ]
        return torch.tensor(betas, dtype=torch.float64)
    raise ConfigError(f"noise_schedule={noise_schedule!r} is unknown; {did_you_mean(noise_schedule, NOISE_SCHEDULES)}")


def spaced_timesteps(num_timesteps: int, respacing: str | int | Iterable[int] | None) -> list[int]:
    """Original timesteps that a shorter process keeps, ascending.

    None or "" keeps all; "100" keeps 100 evenly (fractional stride, rounded); "10,15,20" cuts the range into three
    equal sections with that many steps each; "ddim25" keeps every 40th of 1000 (integer stride, starting at 0).

    Raises:
        ConfigError: a section is too short for its count, or no integer stride gives the asked number.
    """
    if respacing is None or respacing == "":
        return list(range(num_timesteps))
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for step in range(1, num_timesteps):
            strided = list(range(0, num_timesteps, step))
            if len(strided) == count:
                return strided
        raise ConfigError(f"timestep_respacing={respacing!r}: no integer stride keeps {count} of {num_timesteps} steps")
    counts = [int(part) for part in str(respacing).split(",")] if isinstance(respacing, (str, int)) else list(respacing)
    size, extra = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (1 if section < extra else 0)
        if not 1 <= count <= length:
            raise ConfigError(f"timestep_respacing={respacing!r}: a section of {length} steps cannot keep {count}")
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)
        position = 0.0  # accumulated, not multiplied: the original's float sums decide ties in the same way
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept
