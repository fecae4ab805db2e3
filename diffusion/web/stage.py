"""Pieces of HTML that a page shows while it draws, and afterwards. All texts in them are escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from diffusion.web.jobs import Progress

_SHOWN = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "seed": "Seed",
    "solver": "Solver",
    "steps": "Steps",
    "guidance_scale": "Guidance",
    "strength": "Strength",
    "controlnet_conditioning_scale": "Condition strength",
    "lora": "LoRA",
    "model": "Model",
    "model_fingerprint": "Model fingerprint",
}


def stage(progress: Progress, seconds: float = 0.0) -> str:
    """Where a request is: its place in the queue, its step with a preview, or what became of it."""
    parts = {"waiting": _waiting, "drawing": _drawing, "done": _ended, "stopped": _ended, "failed": _failed}
    return f'<div class="stage {progress.stage}">{parts[progress.stage](progress, seconds)}</div>'


def _waiting(progress: Progress, seconds: float) -> str:
    ahead = progress.place - 1
    text = "You are next." if ahead == 0 else f"{ahead} request{'s' if ahead > 1 else ''} before yours."
    return f'<p role="status">In the queue. {text}</p><progress aria-label="Waiting in the queue"></progress>'


def _drawing(progress: Progress, seconds: float) -> str:
    which = f"Picture {progress.picture} of {progress.pictures}" if progress.pictures > 1 else "Drawing"
    picture = ""
    if progress.preview is not None:
        picture = f'<img class="preview" alt="Preview of the picture" src="{_data_uri(progress.preview)}">'
    return (
        f'<p><span role="status">{which}</span> <span class="count">step {progress.step} of {progress.steps}</span></p>'
        f'<progress aria-label="Steps" max="{progress.steps}" value="{progress.step}"></progress>{picture}'
    )


def _ended(progress: Progress, seconds: float) -> str:
    count = len(progress.paths)
    pictures = f"{count} picture{'s' if count != 1 else ''}"
    if progress.stage == "stopped":
        text = f"Stopped. {pictures} drawn before." if count else "Stopped."
    else:
        text = f"{pictures} in {seconds:.1f} s."
    return f'<p role="status">{text}</p>{_notices(progress)}'


def _failed(progress: Progress, seconds: float) -> str:
    return f'<p role="alert">{html.escape(progress.message)}</p>{_notices(progress)}'


def _notices(progress: Progress) -> str:
    return "".join(f'<p class="notice">{html.escape(notice)}</p>' for notice in progress.notices)


def recipe_table(recipe: Mapping[str, Any] | None) -> str:
    """How a picture was made, for a person to read."""
    if recipe is None:
        return '<p class="hint">Choose a picture to see how it was made.</p>'
    rows = [(label, recipe[key]) for key, label in _SHOWN.items() if recipe.get(key) not in (None, "")]
    rows.insert(3, ("Size", f"{recipe['width']} x {recipe['height']} px"))
    cells = "".join(f"<dt>{label}</dt><dd>{html.escape(str(value))}</dd>" for label, value in rows)
    return f'<dl class="recipe">{cells}</dl>'


def _data_uri(image: Image.Image) -> str:
    """Inside the page, so that a preview leaves no file behind."""
    small = image.copy()
    small.thumbnail((96, 96))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
