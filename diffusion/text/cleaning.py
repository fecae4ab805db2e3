"""Caption cleaning: one that keeps the meaning, and the original's, which removes much."""

from __future__ import annotations

import html
import unicodedata
from typing import Any

from diffusion.errors import PromptError

MAX_CAPTION_CHARS = 2000
# Part of the fingerprint of stored features: raise it whenever a cleaned caption may come out differently.
CLEANER_VERSION = "1"


def clean_caption(text: str, mode: str = "light") -> str:
    """Clean one caption; idempotent and linear in the length of the text.

    `light` cuts at 2000 characters, unescapes HTML entities, normalises to Unicode NFC, removes control characters
    and collapses whitespace. `none` keeps the text, except lone surrogates, which no tokenizer accepts. `original` is
    what PixArt-alpha was trained with (two passes of DeepFloyd IF's cleaning, which diffusers keeps): lower case, and
    no URLs, HTML, numbers of six digits, Chinese letters or most marks; it is not idempotent.

    Raises ValueError for another mode, PromptError when a package that `original` needs is missing.
    """
    if mode not in ("light", "none", "original"):
        raise ValueError(f"cleaning mode {mode!r} is unknown; use 'light', 'none' or 'original'")
    if mode == "original":
        return _original(_replace_surrogates(text[:MAX_CAPTION_CHARS]))
    if mode == "none":
        return _replace_surrogates(text)
    text = _replace_surrogates(text[:MAX_CAPTION_CHARS])
    # One pass can uncover another entity ("&amp;lt;"), so it is repeated until nothing changes; each change shortens.
    while (cleaned := _light_pass(text)) != text:
        text = cleaned
    return text


def _light_pass(text: str) -> str:
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = "".join(char for char in text if char.isspace() or unicodedata.category(char) != "Cc")
    return " ".join(text.split())[:MAX_CAPTION_CHARS].rstrip()


def _replace_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _original(text: str) -> str:
    from diffusers import PixArtAlphaPipeline
    from diffusers.utils import is_bs4_available, is_ftfy_available

    if not (is_bs4_available() and is_ftfy_available()):
        raise PromptError("cleaning captions as the original needs two packages; run `pip install beautifulsoup4 ftfy`")
    clean: Any = PixArtAlphaPipeline._clean_caption  # it needs nothing of a pipeline but one pattern of the class
    for _ in range(2):
        text = clean(PixArtAlphaPipeline, text)
    return text
