"""The list of all config keys, made from the schema."""

from __future__ import annotations

from diffusion.config.problems import section_of
from diffusion.config.schema import TrainConfig
from diffusion.config.section import Section


def describe_keys() -> str:
    """All config keys with default and meaning, one a line."""
    return "\n".join(_lines(TrainConfig, ""))


def _lines(section: type[Section], prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        nested = section_of(field.annotation)
        default = "required" if field.is_required() else "section" if nested is not None else repr(field.default)
        lines.append(f"{prefix}{name} ({default}): {field.description}")
        if nested is not None:
            lines += _lines(nested, f"{prefix}{name}.")
    return lines
