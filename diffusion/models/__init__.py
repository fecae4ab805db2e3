"""Networks as plain modules, and the one registry that finds them by name."""

from diffusion.models.attention import KVCompression
from diffusion.models.captions import NULL_CAPTIONS, pad_captions
from diffusion.models.controlnet import ControlPixArt
from diffusion.models.dit import DiT, DiTConfig
from diffusion.models.hed import HED
from diffusion.models.latent_transformer import LatentTransformer
from diffusion.models.pixart import PREDICTION_TYPES, PixArt, PixArtConfig, PixArtMS
from diffusion.models.registry import (
    PixArt_XL_2,
    PixArtMS_XL_2,
    build_model,
    is_class_conditional,
    model_names,
    preset_depth,
    preset_heads,
)
from diffusion.models.reparameterization import silence_sizes, start_from_dit
from diffusion.models.token_sharing import TokenSharing

__all__ = [
    "HED",
    "NULL_CAPTIONS",
    "PREDICTION_TYPES",
    "ControlPixArt",
    "DiT",
    "DiTConfig",
    "KVCompression",
    "LatentTransformer",
    "PixArt",
    "PixArtConfig",
    "PixArtMS",
    "PixArtMS_XL_2",
    "PixArt_XL_2",
    "TokenSharing",
    "build_model",
    "is_class_conditional",
    "model_names",
    "pad_captions",
    "preset_depth",
    "preset_heads",
    "silence_sizes",
    "start_from_dit",
]
