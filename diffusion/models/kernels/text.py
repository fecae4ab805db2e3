"""Captions of different lengths in one batch: what cross-attention needs to leave padding out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class TextLengths(NamedTuple):
    """B captions one after another, without padding between them.

    Args:
        offsets: (B + 1,) int32: caption b has the rows from offsets[b] to offsets[b + 1] of the packed tokens. Rows
            after the last offset belong to no caption.
        longest: the most tokens a caption may have; a number of the host, so that nothing waits for the device.
    """

    offsets: Tensor
    longest: int


def pack(caption: Tensor, caption_mask: Tensor) -> tuple[Tensor, TextLengths]:
    """(B, L, C) tokens and (B, L) mask to (B * L, C) with the kept tokens in front, in order, and their lengths.

    The shape does not depend on the mask, so nothing waits for the device; rows at the end repeat the first token and
    are read by nobody.
    """
    batch, length = caption_mask.shape
    kept = caption_mask.to(torch.bool)
    rows = torch.nonzero_static(kept.flatten(), size=batch * length, fill_value=0)[:, 0]
    offsets = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    return caption.flatten(0, 1).index_select(0, rows), TextLengths(offsets, length)
