"""One picture on several processes: each holds a strip of its tokens.

Legend: B batch, n keys of a strip, P processes, H heads, c channels a head.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class TokenSharing:
    """Processes that share the tokens of a picture, in inference alone.

    Whatever treats tokens one by one works on the strip that a process holds (whole rows of the grid). In
    self-attention its queries meet the keys and values of all strips, which one all-gather brings. Exchanging tokens
    for heads (DeepSpeed-Ulysses, arXiv:2309.14509) moves less, but twice a block and with copies around it, and asks
    for a number of heads that divides by P.

    Args:
        group: of torch.distributed; None = all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def strip(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor along an axis that divides by P."""
        return whole.chunk(self.size, dim)[self.rank]

    def whole(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, n, H, c) of the tokens held here, of equal shapes -> (B, P * n, H, c) of all tokens."""
        held = torch.cat(parts, dim=2)
        strips = held.new_empty(self.size, *held.shape)
        dist.all_gather_into_tensor(strips.flatten(0, 1), held, group=self.group)
        # Strips in the order of ranks are the rows of the picture.
        return strips.transpose(0, 1).flatten(1, 2).chunk(len(parts), dim=2)
