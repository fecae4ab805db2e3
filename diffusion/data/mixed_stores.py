"""Several stores as one data set, each drawn with its own frequency."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from diffusion.data.batch import TrainSample
from diffusion.data.sampler import SampleKey
from diffusion.data.store_dataset import StoreDataset
from diffusion.features import FeatureStore
from diffusion.features.manifest import check_fingerprint

# What a fingerprint says of the sizes of pictures.
SIZE_FIELDS = ("image_size", "multi_scale", "bucket_table", "bucket_measure", "transposes")


class MixedStores:
    """Stores one behind the other; `repeats` tells the sampler how often each sample is drawn an epoch.

    Args:
        weights: one positive number a store.
        any_size: stores may differ in the sizes of their pictures; a batch still holds one size.
    Raises:
        DataError: stores that were made otherwise than the first.
    """

    def __init__(self, stores: Sequence[StoreDataset], weights: Sequence[float], *, any_size: bool = False) -> None:
        self.stores = list(stores)
        ignored = SIZE_FIELDS if any_size else ()
        first, *others = (
            {name: value for name, value in dataset.store.fingerprint.items() if name not in ignored}
            for dataset in self.stores
        )
        for dataset, fingerprint in zip(self.stores[1:], others):
            check_fingerprint(dataset.store.root, fingerprint, first)
        self._ends = list(accumulate(len(store) for store in self.stores))
        self.buckets = [bucket for store in self.stores for bucket in store.buckets]
        self.repeats = [weight for store, weight in zip(self.stores, weights) for _ in range(len(store))]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def feature_stores(self) -> list[FeatureStore]:
        """The stores behind this data set."""
        return [dataset.store for dataset in self.stores]

    @property
    def caption_channels(self) -> int:
        return self.stores[0].caption_channels

    @property
    def null_caption(self) -> Tensor:
        """(L0, caption_channels): T5("")."""
        return self.stores[0].null_caption

    @property
    def has_conditions(self) -> bool:
        """Whether samples carry what a ControlNet follows; the fingerprints say that all stores are alike."""
        return self.stores[0].has_conditions

    def attribute(self, name: str) -> list[str]:
        """One attribute of every sample."""
        return [value for store in self.stores for value in store.attribute(name)]

    def __getitem__(self, key: SampleKey) -> TrainSample:
        store, own_key = self._locate(key)
        return store[own_key]

    def caption_of(self, key: SampleKey) -> str:
        """Text of the caption that a sample is drawn with."""
        store, own_key = self._locate(key)
        return store.caption_of(own_key)

    def _locate(self, key: SampleKey) -> tuple[StoreDataset, SampleKey]:
        number = bisect.bisect_right(self._ends, key.index)
        first = self._ends[number - 1] if number else 0
        return self.stores[number], SampleKey(key.index - first, key.number)
