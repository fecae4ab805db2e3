"""Dropping captions for classifier-free guidance (arXiv:2207.12598), outside the network.

Two conventions exist for the unconditional branch. "t5_empty": T5("") with its own mask, as diffusers pipelines do
it. "stored": the model's stored null embedding under the mask of the caption it replaces, as the original does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.models import pad_captions


def drop_captions(
    caption_embeds: Tensor, caption_mask: Tensor, drop: Tensor, null_embeds: Tensor, null_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace the captions of the samples where drop is True.

    Args:
        caption_embeds: (B, L, C); caption_mask: (B, L) bool, True = keep.
        drop: (B,) bool.
        null_embeds: (L0, C), T5("") or the stored null caption.
        null_mask: (L0,) bool, its own mask ("t5_empty"), or None: the dropped caption's mask stays ("stored").
    Returns:
        embeds (B, max(L, L0), C) and mask; with "stored" the length stays L.
    Raises:
        ValueError: the stored null caption is shorter than the captions.
    """
    if null_mask is None:
        length = caption_embeds.shape[1]
        if null_embeds.shape[0] < length:
            raise ValueError(f"the stored null caption has {null_embeds.shape[0]} tokens, the captions {length}")
        null = null_embeds[:length].to(caption_embeds)
        return torch.where(drop[:, None, None], null, caption_embeds), caption_mask
    embeds, mask = pad_captions(caption_embeds, caption_mask, null_embeds.shape[0])
    null, keep = pad_captions(null_embeds[None].to(embeds), null_mask[None].to(mask), embeds.shape[1])
    return torch.where(drop[:, None, None], null, embeds), torch.where(drop[:, None], keep, mask)
