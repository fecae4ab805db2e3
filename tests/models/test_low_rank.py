"""Which layers a sum of weights and low-rank factors computes; what it computes is tested in test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from diffusion.models.kernels import low_rank
from diffusion.models.kernels.low_rank import LowRank, takes_sum

ROWS = torch.empty(2, 64, 32)


def part(rank: int = 4, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, trains: bool = True) -> LowRank:
    factors = torch.empty(rank, 32), torch.empty(48, rank)
    for factor in factors:
        factor.requires_grad_(trains)
    return LowRank(torch.empty(48, 32, dtype=dtype), None, *factors, scale)


def test_a_sum_of_weights_is_for_factors_that_train_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not takes_sum(ROWS, [part()])  # not on a GPU
    monkeypatch.setattr(low_rank, "can_run", lambda device: True)
    assert takes_sum(ROWS, [part(), part()])
    assert takes_sum(ROWS, [part(64)])
    refused = {
        "few rows": (ROWS[:, :30], [part()]),
        "no bfloat16": (ROWS, [part(dtype=torch.float32)]),
        "frozen": (ROWS, [part(trains=False)]),
        "high rank": (ROWS, [part(65)]),
        "high rank of three": (ROWS, [part(17)] * 3),
        "ranks differ": (ROWS, [part(4), part(5)]),
        "strengths differ": (ROWS, [part(), part(scale=0.5)]),
    }
    assert not [why for why, (x, parts) in refused.items() if takes_sum(x, parts)]
    with torch.no_grad():
        assert not takes_sum(ROWS, [part()])
