"""Class-conditional denoising: what the first training stage minimises (pixel dependency, PixArt-alpha Sec. 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.objectives.denoising import DenoisingObjective, unwrap


@dataclass
class ClassDenoisingObjective(DenoisingObjective):
    """As `DenoisingObjective`, with classes for captions; class_dropout_prob replaces a class by the null class."""

    def denoiser(
        self,
        model: nn.Module,
        batch: Any,
        drop: Tensor,
        before_block: Callable[..., Tensor] | None = None,
        **inputs: Any,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The network with the classes of a batch, null where drop (B,) is True."""
        class_ids = torch.where(drop, unwrap(model).null_class, batch.class_ids)
        return lambda x_t, t: model(x_t, t, class_ids)
