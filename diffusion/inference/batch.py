"""A file of prompts to a folder of pictures."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.errors import CheckpointError, PromptError
from diffusion.inference.pipeline import PixArtPipeline
from diffusion.inference.recipe import library_versions, model_fingerprint, save_png

_GRID_COLUMNS = 4
_SLUG_CHARS = 60


def read_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file, stripped.

    Raises:
        PromptError: the file is missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(
            f"prompt file {path} cannot be read ({error.strerror}); give --prompt or --txt_file"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(f"prompt file {path} is not UTF-8 (byte {error.start}); save it as UTF-8 text") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise PromptError(f"prompt file {path} holds no prompts; write one prompt a line")
    return prompts


def slug(prompt: str) -> str:
    """A file name part: words joined by "-", at most 60 letters and digits; "prompt" when none is left."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    name = ""
    for word in words:
        if len(name) + len(word) >= _SLUG_CHARS:
            break
        name = f"{name}-{word}" if name else word
    # File systems count bytes (255), and a letter may have four.
    return name or (words[0][:_SLUG_CHARS] if words else "prompt")


def load_pipeline(model_path: str | Path, parts: str | Path, **options: Any) -> PixArtPipeline:
    """A pipeline from a pipeline folder, or from a transformer or `checkpoint-N` folder plus the `parts` of another.

    Args:
        parts: pipeline folder with tokenizer, text encoder and VAE, for a model_path that has none.
        options: of `PixArtPipeline.from_pretrained`.
    Raises:
        CheckpointError: a folder or a part of it is missing.
    """
    model_path, parts = Path(model_path), Path(parts)
    if not model_path.is_dir():
        raise CheckpointError(
            f"model_path {model_path} is no folder; give a pipeline folder or a checkpoint-N "
            f"(official models: `hf download PixArt-alpha/PixArt-XL-2-512x512 --local-dir {model_path}`)"
        )
    if (model_path / "text_encoder").is_dir():
        return PixArtPipeline.from_pretrained(model_path, **options)
    if not parts.is_dir():
        raise CheckpointError(
            f"pipeline_load_from {parts} is no folder; {model_path} needs tokenizer, T5 and VAE from it"
        )
    return PixArtPipeline.from_pretrained(parts, transformer=model_path, **options)


def sample_to_folder(
    pipeline: PixArtPipeline,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    model: str,
    seed: int = 0,
    batch_size: int = 1,
    num_images: int = 1,
    grid: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[Path], Path | None]:
    """Draw every prompt and write `000-slug.png`, ... with recipes; picture k of all has seed + k at any batch size.

    Args:
        model: how the recipe names the model.
        num_images: pictures a prompt.
        grid: also write `grid.png`, all pictures labelled with their prompts.
        settings: further arguments of the pipeline's call.
    Returns:
        the pictures' paths, and the grid's or None.
    Raises:
        PromptError: batch_size or num_images below 1, or a setting outside its range.
    """
    for name, value in (("batch size", batch_size), ("num_images", num_images)):
        if value < 1:
            raise PromptError(f"{name} {value} must be at least 1")
    facts = {
        "model": model,
        "model_fingerprint": model_fingerprint(pipeline.transformer),
        "versions": library_versions(),
    }
    jobs = [(prompt, seed + number) for number, prompt in enumerate(p for p in prompts for _ in range(num_images))]
    folder, paths, labels, pictures = Path(folder), [], [], []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        output = pipeline([prompt for prompt, _ in batch], seed=[value for _, value in batch], **(settings or {}))
        for number, image, recipe in zip(itertools.count(start), output.images, output.recipes):
            paths.append(save_png(image, folder / f"{number:03d}-{slug(recipe['prompt'])}.png", {**recipe, **facts}))
            labels.append(recipe["prompt"])
            pictures.append(image if grid else None)
    if not grid:
        return paths, None
    return paths, _write_grid([image for image in pictures if image is not None], labels, folder, facts)


def _write_grid(pictures: list[Image.Image], labels: list[str], folder: Path, facts: Mapping[str, Any]) -> Path:
    from diffusion.images import labelled_grid

    sheet = labelled_grid(pictures, labels, columns=_GRID_COLUMNS)
    return save_png(sheet, folder / "grid.png", {"prompts": labels, **facts})
