"""Precomputed features: extraction jobs, the sharded store, and readers of the original's files."""

from diffusion.features.extract import extract_folder
from diffusion.features.fingerprint import check_encoders
from diffusion.features.original import read_caption_npz, read_latents_npy
from diffusion.features.rows import FeatureRow
from diffusion.features.stages import ExtractionSettings
from diffusion.features.store import FeatureStore
from diffusion.features.writer import FeatureStoreWriter

__all__ = [
    "ExtractionSettings",
    "FeatureRow",
    "FeatureStore",
    "FeatureStoreWriter",
    "check_encoders",
    "extract_folder",
    "read_caption_npz",
    "read_latents_npy",
]
