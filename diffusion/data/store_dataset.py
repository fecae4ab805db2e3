"""Training samples from a feature store."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from diffusion.data.batch import TrainSample
from diffusion.data.sampler import SampleKey
from diffusion.errors import DataError
from diffusion.features import FeatureStore
from diffusion.process import keyed_integer


class StoreDataset:
    """Samples of a store, or of one of its splits; one of a picture's captions is drawn by the sample's number.

    Args:
        root: the store; split: value of the `split` attribute, None = all; seed: of the caption choice.
        max_captions: only the first so many captions of a picture are drawn; None = all.
    Raises:
        DataError: no store there, or no sample in the split.
    """

    def __init__(
        self, root: str | Path, *, split: str | None = None, seed: int = 0, max_captions: int | None = None
    ) -> None:
        self.store, self.seed = FeatureStore(root), seed
        splits = self.store.attribute("split") if split is not None else None
        self.rows = [i for i in range(len(self.store)) if splits is None or splits[i] == split]
        if not self.rows:
            raise DataError(f"{root} has no sample in split {split!r}; it has {', '.join(sorted(set(splits or ())))}")
        all_buckets, sizes = self.store.buckets(), self.store.column("image_size")
        self.buckets = [all_buckets[row] for row in self.rows]
        self._image_sizes = [tuple(sizes[row]) for row in self.rows]
        keys, counts = self.store.column("key"), self.store.num_captions()
        self._keys = [keys[row] for row in self.rows]
        self._num_captions = [
            counts[row] if max_captions is None else min(counts[row], max_captions) for row in self.rows
        ]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def caption_channels(self) -> int:
        return self.store.caption_channels

    @property
    def null_caption(self) -> Tensor:
        """(L0, caption_channels): T5("")."""
        return self.store.null_caption

    def attribute(self, name: str) -> list[str]:
        """One attribute of every sample, such as the concept."""
        values = self.store.attribute(name)
        return [values[row] for row in self.rows]

    def __getitem__(self, key: SampleKey) -> TrainSample:
        row = self.rows[key.index]
        mean, std = self.store.latents(row)
        caption = keyed_integer(self.seed, "caption", key.number, self._num_captions[key.index])
        height, width = self.buckets[key.index]
        return TrainSample(
            latents_mean=mean,
            latents_std=std,
            caption_embeds=self.store.caption(row, caption),
            img_hw=self._image_sizes[key.index],
            aspect_ratio=height / width,
            number=key.number,
            key=self._keys[key.index],
        )
