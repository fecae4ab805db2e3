"""Networks as plain modules, and the one registry that finds them by name."""

from diffusion.models.attention import KVCompression
from diffusion.models.captions import NULL_CAPTIONS, pad_captions
from diffusion.models.controlnet import ControlPixArt
from diffusion.models.hed import HED
from diffusion.models.pixart import PixArt, PixArtConfig, PixArtMS
from diffusion.models.registry import PixArt_XL_2, PixArtMS_XL_2, build_model, model_names, preset_heads

__all__ = [
    "HED",
    "NULL_CAPTIONS",
    "ControlPixArt",
    "KVCompression",
    "PixArt",
    "PixArtConfig",
    "PixArtMS",
    "PixArtMS_XL_2",
    "PixArt_XL_2",
    "build_model",
    "model_names",
    "pad_captions",
    "preset_heads",
]
