"""Precomputed features: extraction jobs, the sharded store, and readers of the original's files."""

from diffusion.features.extract import ExtractionSettings, extract_folder
from diffusion.features.original import read_caption_npz, read_latents_npy
from diffusion.features.rows import FeatureRow
from diffusion.features.store import FeatureStore, FeatureStoreWriter

__all__ = [
    "ExtractionSettings",
    "FeatureRow",
    "FeatureStore",
    "FeatureStoreWriter",
    "extract_folder",
    "read_caption_npz",
    "read_latents_npy",
]
