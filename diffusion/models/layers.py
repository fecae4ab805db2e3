"""Two small layers of all transformers here. timm has them too, but its import takes longer than torch's own."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers and an activation between them: (..., in_features) -> (..., out_features)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
    ) -> None:
        """`out_features`: None = in_features."""
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, a sample's branch is left out with probability `rate`.

    What is kept is divided by 1 - rate, so that the expected value stays. (B, ...) -> (B, ...).
    """

    def __init__(self, rate: float) -> None:
        """`rate` in [0, 1)."""
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        keep = 1 - self.rate
        kept = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * (kept / keep)
