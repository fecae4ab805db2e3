from __future__ import annotations

import pytest
import torch

from diffusion.evaluation.edges import edge_f1


def column(*places: int, rows: int = 8) -> torch.Tensor:
    edges = torch.zeros(1, 1, rows, 8, dtype=torch.bool)
    for place in places:
        edges[..., place] = True
    return edges


def test_f1_of_lines() -> None:
    assert edge_f1(column(2), column(2)).item() == 1
    assert edge_f1(column(2), column(3)).item() == 1  # within the tolerance
    assert edge_f1(column(2), column(3), tolerance_px=0).item() == 0
    assert edge_f1(column(2), column(5)).item() == 0
    # one of two found lines is wanted, and the only wanted one is found
    assert edge_f1(column(2), column(2, 6)).item() == pytest.approx(2 * 0.5 / 1.5)
    both = torch.cat([column(2), column(2, 6)]), torch.cat([column(2), column(2)])
    assert edge_f1(*both).tolist() == pytest.approx([1, 2 / 3])
    assert edge_f1(column(2), column()).item() == 0
