"""Does a drawing follow the edges it was given? Legend: N pictures, H x W their size in px."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def edge_f1(wanted: Tensor, found: Tensor, tolerance_px: int = 1) -> Tensor:
    """F1 of edge pixels, of which two match when they are at most `tolerance_px` apart along both axes.

    Args:
        wanted, found: (N, 1, H, W) bool.
    Returns:
        (N,) float32 in 0..1: harmonic mean of the share of found pixels that are wanted and of wanted ones that are
        found; 0 when one of the pictures has no edge.
    """

    def near(edges: Tensor) -> Tensor:
        return F.max_pool2d(edges.float(), 2 * tolerance_px + 1, stride=1, padding=tolerance_px) > 0

    def share(edges: Tensor, around: Tensor) -> Tensor:
        return (edges & around).sum((1, 2, 3)) / edges.sum((1, 2, 3)).clamp(min=1)

    precision, recall = share(found, near(wanted)), share(wanted, near(found))
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)
