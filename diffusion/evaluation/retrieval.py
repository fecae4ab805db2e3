"""Which real picture does a drawing show? Nearest neighbours among all pictures of a captioned data set.

Two pictures are as far apart as their colours and their edges are (`picture_features`), each block scaled to unit mean
square distance between two pictures of the gallery, and added. Near duplicates (equal `duplicate_group`) count as one
picture. Legend: Q queries, G pictures of the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import DataError
from diffusion.evaluation.picture_features import colour_features, edge_features, fine_detail_energy
from diffusion.features.sources import Sample, read_folder

RANKS = (1, 5)
_CHUNK = 256


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (N, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Gallery:
    """All pictures that a drawing may show.

    Attributes:
        samples: G pictures with captions and the attributes `concept`, `duplicate_group` and `split`.
        colour: (G, 3072); edges: (G, 2048); both scaled to unit mean square distance between two pictures.
        scales: what the blocks were divided by, (colour, edges).
        detail: (G,) `fine_detail_energy`.
    """

    samples: list[Sample]
    colour: Tensor
    edges: Tensor
    scales: tuple[float, float]
    detail: Tensor

    @cached_property
    def concepts(self) -> list[str]:
        return [sample.attributes["concept"] for sample in self.samples]

    @cached_property
    def groups(self) -> list[str]:
        return [sample.attributes["duplicate_group"] for sample in self.samples]

    def split(self, name: str) -> list[int]:
        """Rows of a split.

        Raises:
            DataError: it has no pictures.
        """
        rows = [row for row, sample in enumerate(self.samples) if sample.attributes.get("split") == name]
        if not rows:
            known = sorted({sample.attributes.get("split", "") for sample in self.samples})
            raise DataError(f"split {name!r} has no pictures; choose one of {', '.join(known)}")
        return rows

    def distances(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances (Q, G) of pictures (Q, 3, H, W): colour and edges together, and colour alone."""
        colour = _squared_distances(colour_features(pixels) / self.scales[0], self.colour)
        return colour + _squared_distances(edge_features(pixels) / self.scales[1], self.edges), colour


def load_gallery(folder: str | Path, transform: Callable[[Image.Image], Image.Image] | None = None) -> Gallery:
    """Read every picture of an ImageFolder such as data/emoji.

    Args:
        transform: what the pictures become before they are compared; None = they stay.
    Raises:
        DataError: no such folder, an unreadable picture, or pictures without `concept` and `duplicate_group`.
    """
    samples = read_folder(folder)
    for sample in samples:
        lacking = [name for name in ("concept", "duplicate_group") if not sample.attributes.get(name)]
        if lacking:
            raise DataError(f"{sample.key}: its row in metadata.jsonl has no {' and no '.join(lacking)}")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def picture(sample: Sample) -> Image.Image:
        return sample.decode() if transform is None else transform(sample.decode())

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), _CHUNK):
            pixels = to_pixels(list(pool.map(picture, samples[start : start + _CHUNK])))
            parts.append((colour_features(pixels), edge_features(pixels), fine_detail_energy(pixels)))
    colour, edges, detail = (torch.cat(block) for block in zip(*parts))
    scales = (_mean_square_distance(colour) ** 0.5, _mean_square_distance(edges) ** 0.5)
    return Gallery(samples, colour / scales[0], edges / scales[1], scales, detail)


def _mean_square_distance(features: Tensor) -> float:
    """Mean of |a - b|^2 over all ordered pairs: twice the total variance."""
    return 2 * float(features.double().var(dim=0, correction=0).sum())


def _squared_distances(queries: Tensor, gallery: Tensor) -> Tensor:
    return queries.square().sum(1)[:, None] - 2 * queries @ gallery.T + gallery.square().sum(1)


def nearest_pictures(distances: Tensor, groups: Sequence[str], count: int) -> list[list[int]]:
    """For each of (Q, G) rows the `count` nearest pictures, nearest first, one a group of near duplicates."""
    result = []
    for order in distances.argsort(dim=1).tolist():
        found: dict[str, int] = {}
        for row in order:
            found.setdefault(groups[row], row)
            if len(found) == count:
                break
        result.append(list(found.values()))
    return result


def recall(nearest: Sequence[Sequence[int]], labels: Sequence[str], wanted: Sequence[str], rank: int) -> float:
    """Share of queries with a picture of the wanted label (`labels`: one a gallery row) among their first `rank`."""
    hits = [any(labels[row] == label for row in found[:rank]) for found, label in zip(nearest, wanted)]
    return sum(hits) / len(hits)
