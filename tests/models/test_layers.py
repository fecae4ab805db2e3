"""The small layers compute what timm's do, bit for bit: checkpoints and seeds of either fit the other."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from diffusion.models.layers import DropPath, Mlp


@pytest.mark.parametrize("out_features", [None, 5])
def test_mlp(out_features: int | None) -> None:
    theirs = timm.layers.Mlp(8, hidden_features=12, out_features=out_features, act_layer=nn.SiLU)
    ours = Mlp(8, hidden_features=12, out_features=out_features, act_layer=nn.SiLU)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, 3, 8)
    assert torch.equal(ours(tokens), theirs(tokens))


def test_drop_path() -> None:
    branch, rate = torch.randn(64, 3, 2), 0.3
    torch.manual_seed(0)
    expected = timm.layers.DropPath(rate)(branch)
    torch.manual_seed(0)
    dropped = DropPath(rate)(branch)
    assert torch.equal(dropped, expected)
    assert 0 < (dropped == 0).all(dim=(1, 2)).sum() < len(branch)
    assert torch.equal(DropPath(rate).eval()(branch), branch)
