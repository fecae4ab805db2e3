"""The operations a block spends its time in, each in plain torch and in a faster form; one interface, one folder.

`Kernels` says which form a network uses, and `PixArt.use_kernels` gives it to the blocks. The default is plain torch
everywhere. All forms compute the same function; they differ in rounding.
"""

from diffusion.models.kernels.attention import attend, attend_text, text_width
from diffusion.models.kernels.choice import ATTENTIONS, TEXTS, Kernels, use_kernels
from diffusion.models.kernels.elementwise import (
    gated_residual,
    gelu_mlp,
    kept_norm,
    modulate,
    modulated_norm,
    residual_norm,
)
from diffusion.models.kernels.fp8 import FP8_LAYERS, RECIPES, FP8Linear, use_fp8
from diffusion.models.kernels.heads import from_heads, to_heads, to_qkv
from diffusion.models.kernels.text import TextLengths, pack

__all__ = [
    "ATTENTIONS",
    "FP8_LAYERS",
    "RECIPES",
    "TEXTS",
    "FP8Linear",
    "Kernels",
    "TextLengths",
    "attend",
    "attend_text",
    "from_heads",
    "gated_residual",
    "gelu_mlp",
    "kept_norm",
    "modulate",
    "modulated_norm",
    "pack",
    "residual_norm",
    "text_width",
    "to_heads",
    "to_qkv",
    "use_fp8",
    "use_kernels",
]
