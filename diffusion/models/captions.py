"""Caption batches as the network takes them, and the names of the two null-caption conventions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

# "t5_empty": T5("") under its own mask (diffusers); "stored": y_embedding under the caption's mask (the original).
NULL_CAPTIONS = ("t5_empty", "stored")


def pad_captions(caption_embeds: Tensor, caption_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pad (B, L, C) embeds with zeros and the (B, L) mask with False to at least `length` tokens."""
    missing = length - caption_embeds.shape[1]
    if missing <= 0:
        return caption_embeds, caption_mask
    return F.pad(caption_embeds, (0, 0, 0, missing)), F.pad(caption_mask, (0, missing))
