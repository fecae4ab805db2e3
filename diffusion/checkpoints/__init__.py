"""Weights in and out: key maps, diffusers folders, native files, training checkpoints."""

from diffusion.checkpoints.folders import new_folder
from diffusion.checkpoints.keys import (
    config_from_diffusers,
    config_to_diffusers,
    diffusers_to_native,
    native_to_diffusers,
)
from diffusion.checkpoints.weights import (
    TensorFile,
    find_transformer_folder,
    load_transformer,
    load_weights,
    materialize_buffers,
    read_native,
    read_transformer,
    require_fit,
    save_tensors,
    save_transformer,
)

__all__ = [
    "TensorFile",
    "config_from_diffusers",
    "config_to_diffusers",
    "diffusers_to_native",
    "find_transformer_folder",
    "load_transformer",
    "load_weights",
    "materialize_buffers",
    "native_to_diffusers",
    "new_folder",
    "read_native",
    "read_transformer",
    "require_fit",
    "save_tensors",
    "save_transformer",
]
