"""Explain what is wrong with a config in one line: key, value, file, rule, nearest valid name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffusion.config.section import Section
from diffusion.errors import ConfigError

KeyPath = tuple[str, ...]
_SHOWN_CHARACTERS = 80
_TYPE_RULES = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be True or False",
    "string_type": "must be a string in quotes",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list, such as ['a', 'b'] or [1, 2]",
    "missing": "is required but not set",
}
_REMEDIES = {
    "optimizer.type": "; replace the section: optimizer=dict(_delete_=True, type='AdamW', lr=..., weight_decay=...)"
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("greater than or equal to", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("less than or equal to", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks included, turned into one space."""
    return " ".join(text.split())


def shown(value: Any) -> str:
    """repr of a config value on one line, shortened to about 80 characters."""
    text = one_line(repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def nearest(name: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The choice that reads most like `name` (letter case ignored), or None when none is as near as `cutoff`."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), list(by_lower_case), n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else None


def check_choice(key: str, value: str, choices: Sequence[str], source: str) -> str:
    """Return `value` when it is one of `choices`.

    Args:
        key: dotted config key, such as 'model'.
        source: where the value was set (config file, file:line or '--cfg-options'); opens the message.
    Raises:
        ConfigError: names key, value, source, the nearest choice and all choices.
    """
    if value in choices:
        return value
    raise ConfigError(f"{source}: {key}={shown(value)} {_choice_rule(value, choices)}")


def _choice_rule(value: Any, choices: Sequence[str]) -> str:
    guess = nearest(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean {guess!r}?" if guess is not None else ""
    return f"must be one of {', '.join(repr(choice) for choice in choices)}{hint}"


def all_keys(section: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key path below `section`, sections themselves included, in order of definition."""
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        nested = section_of(field.annotation)
        if nested is not None:
            yield from all_keys(nested, (*prefix, name))


def section_of(annotation: Any) -> type[Section] | None:
    """The section class in an annotation `S` or `S | None`; None for plain values."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((item for item in options if isinstance(item, type) and issubclass(item, Section)), None)


def nearest_key(path: KeyPath, root: type[BaseModel]) -> str | None:
    """The valid dotted key nearest to an unknown `path`.

    A slip of a sibling comes first, then the right name in the wrong section, then looser likeness.
    """
    name, keys = path[-1], list(all_keys(root))
    siblings = {key[-1]: ".".join(key) for key in keys if key[:-1] == path[:-1]}
    anywhere = {key[-1]: ".".join(key) for key in reversed(keys)}
    for cutoff, names in ((0.85, siblings), (0.95, anywhere), (0.6, siblings), (0.6, anywhere)):
        found = nearest(name, list(names), cutoff)
        if found is not None:
            return names[found]
    return None


def explain(error: ValidationError, root: type[BaseModel], locate: Callable[[KeyPath], str]) -> ConfigError:
    """Turn pydantic's report into one ConfigError about the first problem; the others are named.

    Args:
        root: the config class that was validated.
        locate: gives the place (file:line) that set a key path.
    """
    problems = sorted(error.errors(include_url=False), key=_urgency)
    first, others = problems[0], [".".join(_key_path(problem)) for problem in problems[1:4]]
    more = f" (also wrong: {', '.join(others)})" if others else ""
    return ConfigError(one_line(f"{locate(_key_path(first))}: {_sentence(first, root)}{more}"))


def _urgency(problem: ErrorDetails) -> int:
    """A wrong `type` explains the errors beside it; an unknown key may be the missing one, so absence comes last."""
    if problem["loc"] and problem["loc"][-1] == "type" and problem["type"] != "missing":
        return 0
    return {"extra_forbidden": 1, "missing": 3}.get(problem["type"], 2)


def _key_path(problem: ErrorDetails) -> KeyPath:
    path = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "config_rule":
        path += tuple(problem["ctx"]["key"].split("."))
    return path


def _sentence(problem: ErrorDetails, root: type[BaseModel]) -> str:
    path, kind, value = _key_path(problem), problem["type"], problem["input"]
    key = ".".join(path)
    if kind == "extra_forbidden":
        return f"unknown key {key!r} (value {shown(value)}); {_unknown_key_hint(path, root)}"
    if kind == "missing":
        return f"{key} {_TYPE_RULES[kind]}"
    if kind == "config_rule":
        name = problem["ctx"]["key"]
        assigned = f"={shown(value[name])}" if name in value else ""
        return f"{key}{assigned} {problem['ctx']['text']}"
    return f"{key}={shown(value)} {_rule(problem, path, root)}"


def _unknown_key_hint(path: KeyPath, root: type[BaseModel]) -> str:
    guess = nearest_key(path, root)
    if guess is not None:
        section = ".".join([*path[:-1], ""])
        beside = guess.removeprefix(section) if guess.startswith(section) else guess
        return f"did you mean {beside!r}?"
    siblings = [key[-1] for key in all_keys(root) if key[:-1] == path[:-1]] if len(path) > 1 else []
    return f"valid keys: {', '.join(siblings)}" if siblings else "`python -m diffusion.config` lists all keys"


def _rule(problem: ErrorDetails, path: KeyPath, root: type[BaseModel]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return _choice_rule(problem["input"], _literal_choices(path, root)) + _REMEDIES.get(".".join(path), "")
    if kind == "too_long":
        return f"must have {context['max_length']} entries"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(problem["input"], str):
        return f"{_TYPE_RULES[kind]}, not a string"
    if kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        return f"must be {sign} {context[name]}"
    if kind == "model_type":
        keys = [key[-1] for key in all_keys(root) if key[:-1] == path]
        return f"must be a dict(...) with the keys {', '.join(keys)}"
    return _TYPE_RULES.get(kind, f"is not accepted: {problem['msg']}")


def _literal_choices(path: KeyPath, root: type[BaseModel]) -> list[str]:
    section: type[BaseModel] = root
    for part in path[:-1]:
        nested = section_of(section.model_fields[part].annotation)
        assert nested is not None, "a literal lies below sections only"
        section = nested
    annotation = section.model_fields[path[-1]].annotation
    literals = [item for option in (annotation, *get_args(annotation)) for item in get_args(option)]
    return [item for item in literals if isinstance(item, str)]
