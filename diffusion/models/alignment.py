"""The projection that REPA (arXiv:2410.06940) trains between hidden tokens and a picture encoder's features."""

from __future__ import annotations

from torch import Tensor, nn


class AlignmentHead(nn.Module):
    """(B, N, D) -> (B, N, A), A the encoder's width. It lives in a network as `alignment_head` while it trains."""

    def __init__(self, width: int, hidden_width: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, out_channels),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)
