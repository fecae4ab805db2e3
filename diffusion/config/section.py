"""What all config sections share: frozen, strict, no unknown keys.

Strict means that nothing is converted silently: "32" is not an integer, "False" is not a bool and True is not 1.
An int where a float is expected is fine, and so is a list where a tuple is kept.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of every config section: immutable, typed, refuses unknown keys and NaN."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def rule_error(key: str, text: str) -> PydanticCustomError:
    """An error about `key` (dotted, below the section that raises it); `text` is the rule and the remedy."""
    return PydanticCustomError("config_rule", "{text}", {"key": key, "text": text})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Integers = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
FloatPair = Annotated[tuple[float, float], BeforeValidator(_as_tuple)]
