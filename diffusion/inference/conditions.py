"""What the network is told: captions, null captions, picture sizes. Legend: B pictures, L tokens, C text width."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusion.errors import PromptError
from diffusion.models import PixArt, pad_captions
from diffusion.text import MAX_CAPTION_CHARS, clean_caption

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditions:
    """embeds (B, L, C), mask (B, L) True = keep, and keyword arguments with the sizes of a micro-conditioned model.

    control: (B, C, h, w) scaled latents that a ControlNet follows, or None.
    alone: so many captions, the first ones, have one token, which comes first (T5 of an empty text).
    With guidance all have 2B rows, the unconditional half first.
    """

    embeds: Tensor
    mask: Tensor
    sizes: dict[str, Tensor] = field(default_factory=dict)
    control: Tensor | None = None
    alone: int = 0

    def padded(self, length: int) -> Conditions:
        """The same with captions of at least `length` tokens."""
        embeds, mask = pad_captions(self.embeds, self.mask, length)
        return replace(self, embeds=embeds, mask=mask)


def prepare_prompt(text: str, *, clean: bool = False) -> str:
    """A prompt as the T5 of PixArt expects it: lower case, stripped (as stock diffusers does); cut at 2000 characters.

    Args:
        clean: also clean it as the original did, see `clean_caption`.
    """
    if len(text) > MAX_CAPTION_CHARS:
        kept, dropped = text[:MAX_CAPTION_CHARS], text[MAX_CAPTION_CHARS:]
        _logger.warning(
            "a prompt of %d characters was cut at %d; dropped: %s", len(text), MAX_CAPTION_CHARS, shortened(dropped)
        )
        text = kept
    return clean_caption(text, "original" if clean else "none").lower().strip()


def shortened(text: str, length: int = 100) -> str:
    """Quoted on one line, for a message."""
    return repr(text if len(text) <= length else f"{text[:length]}...")


def with_null_caption(embeds: Tensor, mask: Tensor, null_embeds: Tensor, null_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Put the unconditional half before the captions, each under its own mask (diffusers' convention).

    Args:
        embeds, mask: (B, L, C), (B, L).
        null_embeds, null_mask: (1 or B, L0, C), (1 or B, L0).
    Returns:
        (2B, max(L, L0), C) and (2B, max(L, L0)).
    """
    length = max(embeds.shape[1], null_embeds.shape[1])
    embeds, mask = pad_captions(embeds, mask, length)
    null_embeds, null_mask = pad_captions(null_embeds.to(embeds), null_mask.to(mask), length)
    count = len(embeds)
    return torch.cat([null_embeds.expand(count, -1, -1), embeds]), torch.cat([null_mask.expand(count, -1), mask])


def with_stored_null_caption(embeds: Tensor, mask: Tensor, network: PixArt) -> tuple[Tensor, Tensor]:
    """Put the model's stored null embedding before the captions, under the captions' masks (the original's convention).

    Raises:
        PromptError: the model brings no stored null caption, or one shorter than the prompts.
    """
    stored: Tensor = network.y_embedder.y_embedding
    if not stored.any():
        raise PromptError("null_caption='stored' needs a model with a stored null caption; use null_caption='t5_empty'")
    length = embeds.shape[1]
    if len(stored) < length:
        raise PromptError(
            f"null_caption='stored' covers {len(stored)} tokens, the longest prompt has {length}; shorten the prompt"
        )
    null = stored[:length].to(embeds).expand(len(embeds), -1, -1)
    return torch.cat([null, embeds]), torch.cat([mask, mask])


def size_conditions(network: PixArt, rows: int, height: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """img_hw (rows, 2) in px and aspect_ratio (rows,) = height / width in float32, or nothing for models without."""
    if not network.config.micro_condition:
        return {}
    size = torch.tensor([height, width], dtype=torch.float32, device=device)
    return {"img_hw": size.expand(rows, 2), "aspect_ratio": (size[0] / size[1]).expand(rows)}
