"""The network under the conditions of one call, as solvers ask it. Legend: B pictures, C latent channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.inference.conditions import Conditions
from diffusion.inference.denoising import guide
from diffusion.inference.shortcuts import ReusedBlocks, Shortcuts
from diffusion.models import ControlPixArt, PixArt
from diffusion.models.pixart import TextSignal, TimeSignal


@dataclass(frozen=True)
class Guidance:
    """What is made of the network's output.

    Args:
        scale: of classifier-free guidance; a tensor () where one CUDA graph serves all scales; None = no guidance.
        guided_channels: see `guide`.
        keep_variance: the solver takes the variance channels.
        condition_strength: of a ControlNet.
    """

    scale: float | Tensor | None
    guided_channels: int | None = None
    keep_variance: bool = False
    condition_strength: float = 1.0


class GuidedPrediction:
    """(x_t, timestep) -> guided prediction. Caption projection, text keys and values are worked out here, once.

    With guidance both halves go through the network as one batch, the unconditional one first.
    """

    def __init__(
        self,
        network: PixArt | ControlPixArt,
        conditions: Conditions,
        guidance: Guidance,
        *,
        timesteps: Sequence[Tensor] = (),
        shortcuts: Shortcuts | None = None,
    ) -> None:
        """
        Args:
            timesteps: all that will be asked for, on the CPU: their embedding and modulation are then worked out at
                once, which may round otherwise than step by step. None given = step by step.
            shortcuts: lossy savings, by the place of a step in `timesteps`.
        """
        self._network, self._conditions, self._guidance = network, conditions, guidance
        self._places = {float(timestep): index for index, timestep in enumerate(timesteps)}
        self._time = self._embed_all(list(self._places)) if self._places else None
        self._shortcuts = shortcuts or Shortcuts()
        self._reused = ReusedBlocks(network) if self._shortcuts.reuse_every > 1 else None  # type: ignore[arg-type]
        rows = len(conditions.embeds)
        self._text = {rows: self._embed_text(rows)}
        if guidance.scale is not None and self._shortcuts.guidance_until < 1:
            self._text[rows // 2] = self._embed_text(rows // 2)

    def __call__(self, latents: Tensor, timestep: Tensor, *, unconditional: Tensor | None = None) -> Tensor:
        """(B, C, h, w), () on the CPU -> (B, C, h, w), or (B, 2C, h, w) with variance; float32.

        unconditional: other latents for the unconditional half.
        """
        guidance, channels = self._guidance, self._network.config.in_channels
        place, steps = self._places.get(float(timestep), 0), len(self._places)
        guided = guidance.scale is not None and (not steps or self._shortcuts.guides(place, steps))
        inputs = torch.cat([latents if unconditional is None else unconditional, latents]) if guided else latents
        time, text = self._embed_time(float(timestep), len(inputs)), self._text[len(inputs)]
        if self._reused is not None:
            output = self._reused.predict(inputs, time, text, anew=self._shortcuts.runs_all(place, steps))
        else:
            output = self._network.predict(inputs, time, text, **self._control(len(inputs)))
        output = output.float()
        if guided:
            assert guidance.scale is not None
            return guide(
                output,
                channels,
                guidance.scale,
                keep_variance=guidance.keep_variance,
                guided_channels=guidance.guided_channels,
            )
        return output if guidance.keep_variance else output[:, :channels]

    def _control(self, rows: int) -> dict[str, Any]:
        control = self._conditions.control
        if control is None:
            return {}
        return {"control_latents": control[-rows:], "condition_strength": self._guidance.condition_strength}

    def _embed_text(self, rows: int) -> TextSignal:
        """Of the last rows: those of the captions come after the unconditional ones."""
        conditions = self._conditions
        embeds, mask = conditions.embeds[-rows:], conditions.mask[-rows:]
        alone = max(0, rows - len(conditions.embeds) + conditions.alone)
        return self._network.embed_text(embeds, mask, project=True, alone=alone)

    def _embed_time(self, timestep: float, rows: int) -> TimeSignal:
        if self._time is not None:
            return self._time.row(self._places[timestep])
        # float32 whatever the network's dtype: bfloat16 would round 999 to 1000.
        timesteps = torch.full((rows,), timestep, dtype=torch.float32, device=self._conditions.embeds.device)
        return self._network.embed_time(timesteps, **self._conditions.sizes)

    def _embed_all(self, timesteps: list[float]) -> TimeSignal:
        """One row a step, for all pictures: they have one size."""
        device, sizes = self._conditions.embeds.device, self._conditions.sizes
        # Filled on the device, as a copy from the host would keep this out of a CUDA graph.
        rows = torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in timesteps])
        time = self._network.embed_time(
            rows, **{name: value[:1].expand(len(rows), *value.shape[1:]) for name, value in sizes.items()}
        )
        return self._network.with_tables(time)
