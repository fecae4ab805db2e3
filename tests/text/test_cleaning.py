from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.text import MAX_CAPTION_CHARS, clean_caption


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\t red \n apple  ", "a red apple"),
        ("Tom &amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("&amp;amp;lt;", "<"),
        ("a\0b\x07c", "abc"),
        ("café", "café"),
        ("emoji 👩‍🚀, 汉字, \u200fright", "emoji 👩‍🚀, 汉字, \u200fright"),
        ("Keep CASE, punctuation... #1 (yes)!", "Keep CASE, punctuation... #1 (yes)!"),
        ("", ""),
        ("lone \ud800 surrogate", "lone ? surrogate"),
    ],
)
def test_light_cleaning(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=80) | st.text("&amp;lt;gt#x0 \n\0é\u0301\u0958", max_size=80))
def test_cleaning_is_idempotent_normalised_and_encodable(text: str) -> None:
    cleaned = clean_caption(text)
    assert clean_caption(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(char) == "Cc" for char in cleaned)
    cleaned.encode("utf-8")


@pytest.mark.parametrize("nasty", ["<", "&amp;", "&", "www.", "\u0958", " ", "e\u0301", "&notin;"])
def test_long_captions_are_cut_quickly(nasty: str) -> None:
    started = time.process_time()
    cleaned = clean_caption(nasty * 300_000)
    assert len(cleaned) <= MAX_CAPTION_CHARS
    assert clean_caption(cleaned) == cleaned
    assert time.process_time() - started < 1.0  # 50 ms is typical; quadratic cleaning would take minutes


def test_none_keeps_the_text() -> None:
    assert clean_caption("  A &amp; B\n", "none") == "  A &amp; B\n"


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'heavy'"):
        clean_caption("a", "heavy")
