"""The two-layer perceptron and stochastic depth of transformer blocks, with the names that weight files have.

timm has both; importing it would load over 200 further modules at the start of every program.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, activation, linear: (..., in_features) -> (..., out_features); None = as many as in_features."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features or in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features or in_features, out_features or in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.fc2(self.act(self.fc1(inputs)))
        return outputs


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training a branch is zero with probability `rate`, else scaled."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...) -> (B, ...), of the same expectation."""
        if not self.training:
            return branch
        kept = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * kept.div_(1 - self.rate)
