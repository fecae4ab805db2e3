"""Data sets of precomputed features, and the one sampler that owns their order."""

from diffusion.data.batch import TrainBatch, TrainSample, collate
from diffusion.data.building import build_dataset, build_loader
from diffusion.data.original_datasets import OriginalLayout
from diffusion.data.sampler import AspectRatioBatchSampler, EndlessBatches, SampleKey
from diffusion.data.store_dataset import StoreDataset

__all__ = [
    "AspectRatioBatchSampler",
    "EndlessBatches",
    "OriginalLayout",
    "SampleKey",
    "StoreDataset",
    "TrainBatch",
    "TrainSample",
    "build_dataset",
    "build_loader",
    "collate",
]
