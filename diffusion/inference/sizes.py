"""Picture sizes: the trained sizes of a model, and the directives `--ar`, `--aspect_ratio` and `--hw` in a prompt."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from diffusion.errors import PromptError
from diffusion.images import aspect_ratio_table, closest_bucket

_logger = logging.getLogger(__name__)

MAX_SIDE_PX = 8192  # the longest side of the largest table
_TABLE_SIZES = (256, 512, 1024, 2048)
_DIRECTIVE = re.compile(r"\s*--(ar|aspect_ratio|hw)\b[\s=]*([^\s]*)")
_PAIR = re.compile(r"(\d+(?:\.\d+)?)[:x](\d+(?:\.\d+)?)")


def binned_size(model_px: int, height: float, width: float) -> tuple[int, int]:
    """The (height, width) in px, of those that a model of `model_px` is offered at inference, nearest in ratio.

    Raises:
        PromptError: there is no table for a model of that size.
    """
    if model_px not in _TABLE_SIZES:
        raise PromptError(
            f"use_resolution_binning has no sizes for a model of {model_px} px, only for "
            f"{', '.join(map(str, _TABLE_SIZES))}; turn it off"
        )
    table = aspect_ratio_table(f"ASPECT_RATIO_{model_px}_TEST")
    return table[closest_bucket(height, width, table)]


@dataclass(frozen=True)
class SizedPrompt:
    """A prompt without its directives, and the size in px that they ask for; None = nothing was asked.

    binned: draw the nearest trained size, then cut to the asked one.
    """

    text: str
    height: int | None = None
    width: int | None = None
    binned: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that say the size; none where nothing was asked."""
        if self.height is None:
            return {}
        return {"height": self.height, "width": self.width, "use_resolution_binning": self.binned}


def parse_directives(prompt: str, model_px: int) -> SizedPrompt:
    """Read and cut off `--ar h:w` (or `--aspect_ratio`) and `--hw h:w`.

    `--ar 9:16` gives the model's trained size nearest to that ratio of height to width; `--hw 600:900` exactly that
    many px, drawn at the nearest trained size. With both, `--hw` decides.

    Raises:
        PromptError: a directive without two positive numbers, or sides that are too long.
    """
    text, name, height, width = read_directives(prompt)
    if name == "ar":
        tall, wide = binned_size(model_px, height, width)
        return SizedPrompt(text, tall, wide)
    return SizedPrompt(text, int(height), int(width), binned=True) if name == "hw" else SizedPrompt(text)


def read_directives(prompt: str) -> tuple[str, str | None, float, float]:
    """A prompt without its directives, the one that decides ("hw", "ar" or None), its height and its width.

    That much needs no model, so a prompt can be refused before one is loaded.

    Raises:
        PromptError: see `parse_directives`.
    """
    found = {"ar" if name != "hw" else "hw": value for name, value in _DIRECTIVE.findall(prompt)}
    text = _DIRECTIVE.sub("", prompt).strip()
    for name in ("hw", "ar"):
        if name not in found:
            continue
        match = _PAIR.fullmatch(found[name])
        height, width = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
        if height <= 0 or width <= 0:
            raise PromptError(
                f"--{name} {found[name]} must be height:width, as in --{name} 9:16 (prompt {text[:60]!r})"
            )
        if name == "hw" and (max(height, width) > MAX_SIDE_PX or height % 1 or width % 1):
            raise PromptError(
                f"--hw {found[name]} must be two whole numbers of px, at most {MAX_SIDE_PX} (prompt {text[:60]!r})"
            )
        return text, name, height, width
    return text, None, 0.0, 0.0


def warn_of_untrained_area(model_px: int, height: int, width: int) -> None:
    """Say so when a picture's area is under half or over twice that of the model's training."""
    share = height * width / model_px**2
    if not 0.5 <= share <= 2:
        _logger.warning(
            "%dx%d px has %.2g times the area that this model was trained on (%d px); expect poor pictures, or give "
            "no size to draw its own",
            height, width, share, model_px,
        )  # fmt: skip
