"""Weights in and out: key maps, diffusers folders, native files, training checkpoints."""

from diffusion.checkpoints.keys import (
    config_from_diffusers,
    config_to_diffusers,
    diffusers_to_native,
    native_to_diffusers,
)
from diffusion.checkpoints.weights import (
    find_transformer_folder,
    load_transformer,
    load_weights,
    materialize_buffers,
    read_native,
    read_transformer,
    save_transformer,
)

__all__ = [
    "config_from_diffusers",
    "config_to_diffusers",
    "diffusers_to_native",
    "find_transformer_folder",
    "load_transformer",
    "load_weights",
    "materialize_buffers",
    "native_to_diffusers",
    "read_native",
    "read_transformer",
    "save_transformer",
]
