from __future__ import annotations

import pytest

from diffusion.errors import PromptError
from diffusion.web.line import FairLine


def line_of(*pairs: tuple[str, str], most: int = 9, each: int = 9) -> FairLine[str]:
    line: FairLine[str] = FairLine(most, each)
    for user, item in pairs:
        line.add(user, item)
    return line


def drained(line: FairLine[str]) -> list[str]:
    return [item for _ in range(len(line)) if (item := line.pop()) is not None]


def test_users_take_turns() -> None:
    line = line_of(("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"))
    shown = list(line.in_order())
    assert shown == ["a1", "b1", "c1", "a2", "a3"]
    assert drained(line) == shown
    assert line.pop() is None


def test_a_user_who_was_served_goes_to_the_end() -> None:
    line = line_of(("a", "a1"), ("a", "a2"), ("b", "b1"))
    assert line.pop() == "a1"
    line.add("c", "c1")
    assert drained(line) == ["b1", "a2", "c1"]


def test_limits() -> None:
    with pytest.raises(PromptError, match="all 2 places"):
        line_of(("a", "1"), ("b", "2"), ("c", "3"), most=2)
    with pytest.raises(PromptError, match="1 of your requests"):
        line_of(("a", "1"), ("a", "2"), each=1)


def test_remove() -> None:
    line = line_of(("a", "a1"), ("b", "b1"))
    assert line.remove("a1") and not line.remove("a1")
    assert drained(line) == ["b1"]
