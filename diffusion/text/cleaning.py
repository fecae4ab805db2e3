"""Caption cleaning that keeps the meaning: no words, punctuation, scripts or emoji are removed."""

from __future__ import annotations

import html
import unicodedata

MAX_CAPTION_CHARS = 2000
# Part of the fingerprint of stored features: raise it whenever a cleaned caption may come out differently.
CLEANER_VERSION = "1"


def clean_caption(text: str, mode: str = "light") -> str:
    """Clean one caption; idempotent and linear in the length of the text.

    `light` cuts at 2000 characters, unescapes HTML entities, normalises to Unicode NFC, removes control characters
    and collapses whitespace. `none` keeps the text, except lone surrogates, which no tokenizer accepts.

    Raises ValueError for another mode.
    """
    if mode not in ("light", "none"):
        raise ValueError(f"cleaning mode {mode!r} is unknown; use 'light' or 'none'")
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
