"""Captions: cleaning and T5 encoding."""

from diffusion.text.cleaning import CLEANER_VERSION, MAX_CAPTION_CHARS, clean_caption
from diffusion.text.encoder import CaptionEncoder, load_tokenizer, make_float16_safe, text_folders
from diffusion.text.int8 import Int8Linear, quantize_linears

__all__ = [
    "CLEANER_VERSION",
    "MAX_CAPTION_CHARS",
    "CaptionEncoder",
    "Int8Linear",
    "clean_caption",
    "load_tokenizer",
    "make_float16_safe",
    "quantize_linears",
    "text_folders",
]
