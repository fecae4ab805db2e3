"""`--cfg-options a.b=value`: parse and apply overrides to a plain config dict."""

from __future__ import annotations

import ast
from typing import Any

from diffusion.config.problems import KeyPath, shown
from diffusion.config.sources import OVERRIDE_SOURCE
from diffusion.errors import ConfigError

_WORDS = {"true": True, "false": False}


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """'a.b=value' -> (('a', 'b'), value).

    The value is read as a Python literal (number, True, None, quoted string, list, dict); true and false count as
    booleans, and everything else is a string.
    Raises:
        ConfigError: no '=' in the text, or an empty part in the key.
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"{OVERRIDE_SOURCE}: {text!r} must have the form key=value, such as optimizer.lr=1e-4")
    return path, _literal(value.strip())


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def apply_override(config: dict[str, Any], text: str) -> KeyPath:
    """Set one override in `config` (in place; missing sections are created). Returns the key path that was set.

    A list entry is named by its index (`data.image_list_txt.0=part1.txt`).
    Raises:
        ConfigError: the override is malformed, goes below a plain value, or names a list entry that is not there.
    """
    path, value = parse_override(text)
    target: Any = config
    for depth, part in enumerate(path[:-1]):
        slot = _slot(target, part, path[:depth], text)
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[slot]
    target[_slot(target, path[-1], path[:-1], text)] = value
    return path


def _slot(target: Any, part: str, holder: KeyPath, text: str) -> str | int:
    """The key or list index that `part` means in `target`, which sits at the key path `holder`."""
    name = ".".join(holder)
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        rule = f"{name}={shown(target)} is a plain value, no section; set {name} itself"
        raise ConfigError(f"{OVERRIDE_SOURCE}: cannot set {text!r}: {rule}")
    if not part.isdigit() or int(part) >= len(target):
        rule = f"{name} is a list of {len(target)} entries, numbered from 0"
        raise ConfigError(f"{OVERRIDE_SOURCE}: cannot set {text!r}: {rule}")
    return int(part)
