"""Token routing (TREAD, arXiv:2501.04765): some tokens pass around a span of blocks in training.

Legend: B batch, N image tokens, K kept tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TokenRoute:
    """Within blocks first..last only the kept tokens are there; the others wait with the value they had before.

    One object serves one forward pass, as its `before_block`.

    Args:
        kept: (B, K) int64, positions of the tokens that stay.
        first, last: blocks, counted from 0.
    """

    def __init__(self, kept: Tensor, first: int, last: int) -> None:
        self.kept, self.first, self.last = kept, first, last
        self._all: Tensor | None = None

    def __call__(self, index: int, tokens: Tensor) -> Tensor:
        """The tokens that block `index` gets: (B, N or K, D)."""
        if index == self.first:
            self._all = tokens
            return tokens.gather(1, self._positions(tokens))
        if index == self.last + 1:
            assert self._all is not None
            return self._all.scatter(1, self._positions(tokens), tokens)
        return tokens

    def is_partial(self, index: int) -> bool:
        """Whether the tokens that arrive before block `index` are the kept ones alone."""
        return self.first < index <= self.last + 1

    def _positions(self, tokens: Tensor) -> Tensor:
        return self.kept[:, :, None].expand(-1, -1, tokens.shape[-1])


def kept_tokens(scores: Tensor, share: float) -> Tensor:
    """Positions of the tokens that stay, ascending: (B, N) random scores -> (B, K), K = N - round(share N) or 1."""
    count = max(1, scores.shape[1] - round(share * scores.shape[1]))
    return torch.sort(scores.argsort(dim=1)[:, :count], dim=1).values
