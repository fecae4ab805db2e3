"""Class numbers of samples, for class-conditional networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion.data.store_dataset import StoreDataset
from diffusion.errors import DataError


def give_classes(datasets: Sequence[StoreDataset], attribute: str) -> int:
    """Set `class_ids` of every data set from an attribute of its store; returns how many classes there are.

    Values that are all whole numbers are the class numbers themselves (as in ImageNet); names are numbered in
    alphabetical order. All rows of the stores count, whatever the split: training and validation agree.

    Raises:
        DataError: a store lacks the attribute, or a number is negative.
    """
    values = [dataset.store.attribute(attribute) for dataset in datasets]
    names = sorted({value for each in values for value in each})
    if all(name.lstrip("-").isdigit() for name in names):
        numbers = {name: int(name) for name in names}
        if min(numbers.values()) < 0:
            raise DataError(f"attribute {attribute!r} has class {min(numbers.values())}; classes are 0, 1, 2, ...")
    else:
        numbers = {name: index for index, name in enumerate(names)}
    for dataset, each in zip(datasets, values):
        dataset.class_ids = np.array([numbers[value] for value in each], dtype=np.int64)
    return 1 + max(numbers.values())
