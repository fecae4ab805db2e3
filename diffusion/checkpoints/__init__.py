"""Weights in and out: any checkpoint opened and recognised, key maps, diffusers folders, training checkpoints."""

from diffusion.checkpoints.branch import load_branch, read_branch, save_branch, write_control_file
from diffusion.checkpoints.files import find_transformer_folder
from diffusion.checkpoints.folders import new_folder
from diffusion.checkpoints.hed import load_hed
from diffusion.checkpoints.keys import (
    config_from_diffusers,
    config_to_diffusers,
    diffusers_to_native,
    module_names,
    native_to_diffusers,
)
from diffusion.checkpoints.loading import build_dit, load_controlnet, load_dit, load_transformer
from diffusion.checkpoints.opening import Checkpoint, Weights, open_checkpoint, read_transformer, read_weights
from diffusion.checkpoints.recognition import Found
from diffusion.checkpoints.tensors import TensorFile, read_native
from diffusion.checkpoints.weights import (
    load_weights,
    materialize_buffers,
    require_fit,
    save_tensors,
    save_transformer,
    write_transformer,
)

__all__ = [
    "Checkpoint",
    "Found",
    "TensorFile",
    "Weights",
    "build_dit",
    "config_from_diffusers",
    "config_to_diffusers",
    "diffusers_to_native",
    "find_transformer_folder",
    "load_branch",
    "load_controlnet",
    "load_dit",
    "load_hed",
    "load_transformer",
    "load_weights",
    "materialize_buffers",
    "module_names",
    "native_to_diffusers",
    "new_folder",
    "open_checkpoint",
    "read_branch",
    "read_native",
    "read_transformer",
    "read_weights",
    "require_fit",
    "save_branch",
    "save_tensors",
    "save_transformer",
    "write_control_file",
    "write_transformer",
]
