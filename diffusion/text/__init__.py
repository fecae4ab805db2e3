"""Captions: cleaning and T5 encoding."""

from diffusion.text.cleaning import CLEANER_VERSION, MAX_CAPTION_CHARS, clean_caption
from diffusion.text.encoder import CaptionEncoder, make_float16_safe, text_folders

__all__ = [
    "CLEANER_VERSION",
    "MAX_CAPTION_CHARS",
    "CaptionEncoder",
    "clean_caption",
    "make_float16_safe",
    "text_folders",
]
