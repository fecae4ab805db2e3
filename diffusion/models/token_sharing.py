"""One picture on several processes: each holds a strip of its tokens (DeepSpeed-Ulysses, arXiv:2309.14509).

Legend: B batch, N image tokens, P processes, H heads, C channels a head, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class TokenSharing:
    """Processes that share the tokens of a picture, in inference alone.

    Whatever treats tokens one by one works on the strip of N / P tokens that a process holds (whole rows of the grid).
    Self-attention needs all of them: for it a process gives up its tokens of the other heads, and holds all tokens of
    H / P heads.

    Args:
        group: of torch.distributed; None = all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def strip(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor along an axis that divides by P."""
        return whole.chunk(self.size, dim)[self.rank]

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Tensors (B, H, n / P, C) of the tokens held here -> (B, H / P, n, C); n may differ between them."""
        lengths = [part.shape[2] for part in parts]
        tokens = torch.cat(parts, dim=2)
        split = tokens.unflatten(1, (self.size, -1)).transpose(0, 1)  # (P, B, H / P, n, C), by who gets it
        held = self._exchange(split)  # the same shape, by who sent it
        return tuple(
            part.permute(1, 2, 0, 3, 4).flatten(2, 3)  # strips in the order of ranks are the rows of the picture
            for part in held.split(lengths, dim=3)
        )

    def to_tokens(self, attended: Tensor) -> Tensor:
        """(B, H / P, N, C) -> (B, H, N / P, C), the way back."""
        split = attended.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)  # (P, B, H / P, N / P, C)
        return self._exchange(split).transpose(0, 1).flatten(1, 2)

    def _exchange(self, by_receiver: Tensor) -> Tensor:
        by_receiver = by_receiver.contiguous()
        by_sender = torch.empty_like(by_receiver)
        dist.all_to_all_single(by_sender, by_receiver, group=self.group)
        return by_sender
