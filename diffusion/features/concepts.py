"""Words of a caption that name something, as a rough measure of how dense captions are.

The paper (arXiv:2310.00426) counts distinct nouns. Finding nouns needs a trained tagger; content words, that is all
words but grammatical ones, are counted here instead, and are more numerous than nouns.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W\d_]{2,}")
_GRAMMATICAL_TEXT = """
    about above across after against all along also although always am among an and another any are around as at away
    back be because been before behind being below beneath beside between both but by can could did do does doing down
    during each either else enough even ever every few first for from further had has have having he her here hers him
    his how however if in into is it its itself just last least less like made make makes many may me might mine more
    most much must my near neither next no nor not now of off often on once one only onto or other others our out over
    own per quite rather same second seem seems several shall she should since so some such than that the their them
    then there these they this those three through to together too toward towards two under until up upon us very was
    we were what when where whether which while who whose why will with within without would yet you your
"""
_GRAMMATICAL = frozenset(_GRAMMATICAL_TEXT.split())


def content_words(caption: str) -> set[str]:
    """Different words of two letters or more that are not grammatical English, in lower case."""
    return {word for word in _WORD.findall(caption.lower()) if word not in _GRAMMATICAL}
