"""What a page asks for, checked on the server before anything is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from diffusion.errors import PromptError, did_you_mean
from diffusion.inference.solvers import ALGORITHMS
from diffusion.inference.styles import NO_STYLE, STYLES
from diffusion.web.settings import MAX_SEED, Limits

MODES = {"text": "Words alone", "image": "A picture", "inpaint": "Part of a picture", "edges": "Edges of a picture"}
_PICTURES = ("image", "mask", "control_image")


@dataclass(frozen=True)
class Asked:
    """One request of a page: texts, numbers, and pictures that are decoded already.

    Args:
        mode: of `MODES`. image, mask: for "image" and "inpaint" (white = repaint). control_image: for "edges".
        lora: name of an adapter of the folder; None = none.
    """

    prompt: str
    negative_prompt: str = ""
    style: str = NO_STYLE
    mode: str = "text"
    width: int = 256
    height: int = 256
    solver: str = "dpm-solver"
    steps: int = 14
    guidance_scale: float = 4.5
    seed: int = 0
    pictures: int = 1
    image: Any = None
    mask: Any = None
    strength: float = 0.6
    control_image: Any = None
    control_strength: float = 1.0
    lora: str | None = None
    lora_scale: float = 1.0

    def choices(self) -> dict[str, Any]:
        """All that is no picture, for the recipe: what "reuse settings" puts back."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _PICTURES}


def check(asked: Asked, limits: Limits) -> None:
    """Refuse a request that is outside the limits. Raises PromptError, in one line for the user."""
    for name, text in (("prompt", asked.prompt), ("negative prompt", asked.negative_prompt)):
        if not isinstance(text, str):
            raise PromptError(f"the {name} must be text")
        if len(text) > limits.max_prompt_chars:
            raise PromptError(
                f"the {name} has {len(text):,} characters; at most {limits.max_prompt_chars:,} are read, shorten it"
            )
    if not asked.prompt.strip() and asked.mode == "text":
        raise PromptError("the prompt is empty; say what to draw")
    _among("style", asked.style, STYLES)
    _among("solver", asked.solver, ALGORITHMS)
    _among("mode", asked.mode, MODES)
    _whole("width", asked.width, 16, limits.max_side_px)
    _whole("height", asked.height, 16, limits.max_side_px)
    _whole("steps", asked.steps, 1, limits.max_steps)
    _whole("seed", asked.seed, 0, MAX_SEED)
    _whole("number of pictures", asked.pictures, 1, limits.max_pictures)
    _number("guidance", asked.guidance_scale, 0, limits.max_guidance)
    _number("strength", asked.strength, 0, 1)
    _number("condition strength", asked.control_strength, 0, 2)
    _number("LoRA strength", asked.lora_scale, 0, 2)
    _check_pictures(asked)


def _check_pictures(asked: Asked) -> None:
    if asked.mode in ("image", "inpaint") and asked.image is None:
        raise PromptError("there is no picture to begin from; add one, or draw from words alone")
    if asked.mode == "inpaint" and (asked.mask is None or not asked.mask.getbbox()):
        raise PromptError("nothing is marked; paint over the part that is to be drawn anew")
    if asked.mode == "edges" and asked.control_image is None:
        raise PromptError("there is no picture whose edges could be followed; add one")


def _among(name: str, value: Any, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise PromptError(f"{name} {str(value)[:40]!r} is unknown; {did_you_mean(str(value)[:40], known)}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise PromptError(f"{name} {str(value)[:40]} must be a whole number in {low}..{high}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        raise PromptError(f"{name} {str(value)[:40]} must be a number in {low:g}..{high:g}")


def whole_number(value: Any) -> Any:
    """A float without fraction as an int (JSON and sliders know no difference); anything else as it is."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value
