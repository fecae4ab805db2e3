"""Pictures that say how they were made: PNG with its recipe in the metadata."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from diffusion.errors import DataError

_LABELS = {
    "negative_prompt": "Negative prompt",
    "steps": "Steps",
    "solver": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "model_fingerprint": "Model hash",
    "model": "Model",
}


def model_fingerprint(network: nn.Module) -> str:
    """xxh3-64 over names and float32 values of the parameters, sorted by name: 16 hex digits.

    The same weights give the same fingerprint in 16-bit files and in memory as float32, and on every device.
    """
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(network.named_parameters()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what a picture depends on."""
    import diffusers
    import torch
    import transformers

    import diffusion

    modules = {"pixart": diffusion, "torch": torch, "diffusers": diffusers, "transformers": transformers}
    return {name: str(module.__version__) for name, module in modules.items()}


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, Any]) -> Path:
    """Write a PNG with its recipe: "pixart" holds it as JSON, "parameters" as lines that picture browsers show.

    Written aside and put in place in one step. An existing file is never overwritten: `name.png` becomes
    `name-2.png`, and so on.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text("parameters", _human_text(recipe))
    info.add_text("pixart", json.dumps(dict(recipe), sort_keys=True))
    aside = path.with_name(f".tmp-{uuid.uuid4().hex}.png")
    try:
        with aside.open("xb") as file:
            image.save(file, format="PNG", pnginfo=info)
        return _place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe of a picture that `save_png` wrote.

    Raises:
        DataError: no readable PNG, or without a recipe.
    """
    try:
        with Image.open(path) as image:
            image.load()
            recipe = json.loads(image.info["pixart"])
    except (OSError, SyntaxError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} carries no recipe of this program ({error!r}); give a PNG that it wrote") from error
    if not isinstance(recipe, dict):
        raise DataError(f"{path}: its recipe is no JSON object")
    return recipe


def _place(aside: Path, path: Path) -> Path:
    """Move to `path` or its next free number. A hard link fails when the name is taken, which a rename does not."""
    number = 1
    while True:
        target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            os.link(aside, target)
            return target
        except FileExistsError:
            number += 1
        except OSError:  # a file system without hard links
            if not target.exists():
                os.rename(aside, target)
                return target
            number += 1


def _human_text(recipe: Mapping[str, Any]) -> str:
    known = [(label, recipe[key]) for key, label in _LABELS.items() if recipe.get(key) not in (None, "")]
    if recipe.get("width") and recipe.get("height"):
        known.append(("Size", f"{recipe['width']}x{recipe['height']}"))
    return f"{recipe.get('prompt') or ''}\n" + ", ".join(f"{label}: {value}" for label, value in known)
