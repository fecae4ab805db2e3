"""Training samples from a feature store."""

from __future__ import annotations

import bisect
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch import Tensor

from diffusion.data.batch import TrainSample
from diffusion.data.sampler import SampleKey
from diffusion.errors import DataError
from diffusion.features import FeatureStore
from diffusion.features.alignment import AlignmentFeatures
from diffusion.process import keyed_integer

_RESOLUTION = 1 << 40  # steps of the line on which weighted captions are drawn


class StoreDataset:
    """Samples of a store, or of one of its splits; one of a picture's captions is drawn by the sample's number.

    Args:
        root: the store, a folder or a URL; split: value of the `split` attribute, None = all; seed: of the caption
            choice.
        max_captions: only the first so many captions of a picture are drawn; None = all.
    Raises:
        DataError: no store there, or no sample in the split.
    """

    def __init__(
        self, root: str | Path, *, split: str | None = None, seed: int = 0, max_captions: int | None = None
    ) -> None:
        self.store, self.seed, self.max_captions = FeatureStore(root), seed, max_captions
        # Arrays, not lists: a million rows shall open in a moment and cost megabytes.
        self.rows = np.arange(len(self.store))
        buckets = self.store.buckets()
        if split is not None:
            splits = self.store.attribute("split")
            self.rows = np.flatnonzero(np.array(splits) == split)
            if not len(self.rows):
                raise DataError(f"{root} has no sample in split {split!r}; it has {', '.join(sorted(set(splits)))}")
            buckets = [buckets[row] for row in self.rows]
        self.buckets = buckets
        self.class_ids: np.ndarray | None = None  # one a row of the store; see `give_classes`
        self.alignment: AlignmentFeatures | None = None  # of the store's pictures; see `diffusion.features.alignment`

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def feature_stores(self) -> list[FeatureStore]:
        """The stores behind this data set."""
        return [self.store]

    @property
    def caption_channels(self) -> int:
        return self.store.caption_channels

    @property
    def null_caption(self) -> Tensor:
        """(L0, caption_channels): T5("")."""
        return self.store.null_caption

    @property
    def has_conditions(self) -> bool:
        """Whether samples carry what a ControlNet follows."""
        return "condition" in self.store.fingerprint

    def attribute(self, name: str) -> list[str]:
        """One attribute of every sample, such as the concept."""
        values = self.store.attribute(name)
        return [values[row] for row in self.rows]

    def __getitem__(self, key: SampleKey) -> TrainSample:
        row = int(self.rows[key.index])
        mean, std = self.store.latents(row)
        bucket_height, bucket_width = self.buckets[key.index]
        name, image_size = self.store.identity(row)
        control_mean, control_std = self.store.control(row) or (None, None)
        return TrainSample(
            latents_mean=mean,
            latents_std=std,
            caption_embeds=self.store.caption(row, self._draw_caption(row, key.number)),
            img_hw=image_size,
            aspect_ratio=bucket_height / bucket_width,
            number=key.number,
            key=name,
            class_id=None if self.class_ids is None else int(self.class_ids[row]),
            alignment=None if self.alignment is None else self.alignment[row],
            control_mean=control_mean,
            control_std=control_std,
        )

    def caption_of(self, key: SampleKey) -> str:
        """Text of the caption that a sample is drawn with."""
        row = int(self.rows[key.index])
        return self.store.caption_text(row, self._draw_caption(row, key.number))

    def _draw_caption(self, row: int, number: int) -> int:
        count, weights = self.store.caption_choice(row)
        count = count if self.max_captions is None else min(count, self.max_captions)
        if not weights:
            return keyed_integer(self.seed, "caption", number, count)
        ends = list(accumulate(weights[:count]))
        point = keyed_integer(self.seed, "caption", number, _RESOLUTION) / _RESOLUTION * ends[-1]
        return min(bisect.bisect_right(ends, point), count - 1)
