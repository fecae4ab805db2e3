"""A file of prompts to a folder of pictures."""

from __future__ import annotations

import inspect
import itertools
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import CheckpointError, DataError, PromptError
from diffusion.inference.pipeline import PixArtPipeline
from diffusion.inference.recipe import library_versions, model_fingerprint, read_recipe, save_png
from diffusion.inference.solvers import solver_name

_logger = logging.getLogger(__name__)

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

    A picture that an earlier call wrote with the same recipe is kept, so an interrupted call goes on where it stopped.

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
    folder, settings = Path(folder), settings or {}
    facts = {
        "model": model,
        "model_fingerprint": model_fingerprint(pipeline.transformer),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "versions": library_versions(),
    }
    jobs = [
        _Job(folder / f"{number:03d}-{slug(prompt)}.png", prompt, seed + number)
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(num_images))
    ]
    recipe = _recipe_of(pipeline, settings)
    paths = {
        job: found
        for job in jobs
        if recipe and (found := _written(job.path, {"prompt": job.prompt, "seed": job.seed, **recipe, **facts}))
    }
    todo = [job for job in jobs if job not in paths]
    if paths:
        _logger.info("%d of %d pictures are already in %s", len(paths), len(jobs), folder)
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        output = pipeline([job.prompt for job in batch], seed=[job.seed for job in batch], **settings)
        for job, image, recipe in zip(batch, output.images, output.recipes):
            paths[job] = save_png(image, job.path, {**recipe, **facts})
    done = [paths[job] for job in jobs]
    return done, _write_grid(jobs, done, folder / "grid.png", facts) if grid else None


@dataclass(frozen=True)
class _Job:
    """One picture to be drawn."""

    path: Path
    prompt: str
    seed: int


# Arguments of the pipeline's call and their names in a recipe.
_IN_RECIPE = {name: name for name in ("guidance_scale", "negative_prompt", "null_caption", "height", "width")}
_IN_RECIPE["num_inference_steps"] = "steps"


def _recipe_of(pipeline: PixArtPipeline, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the recipes of a call with these settings will say; None when it sets more than a recipe tells."""
    if not settings.keys() <= _IN_RECIPE.keys():
        return None
    defaults = inspect.signature(PixArtPipeline.__call__).parameters
    recipe = {key: settings.get(name, defaults[name].default) for name, key in _IN_RECIPE.items()}
    for key, value in (("negative_prompt", ""), ("height", pipeline.default_size), ("width", pipeline.default_size)):
        recipe[key] = value if recipe[key] is None else recipe[key]
    return {**recipe, "solver": solver_name(pipeline.scheduler)}


def _written(path: Path, wanted: Mapping[str, Any]) -> Path | None:
    """`path`, or its numbered sibling, where an earlier call wrote this recipe; drawing it again changes nothing."""
    numbered = (path.with_name(f"{path.stem}-{number}.png") for number in itertools.count(2))
    for candidate in itertools.takewhile(Path.exists, itertools.chain([path], numbered)):
        try:
            recipe = read_recipe(candidate)
        except DataError:
            continue
        if all(recipe.get(key) == value for key, value in wanted.items()):
            return candidate
    return None


def _write_grid(jobs: Sequence[_Job], pictures: Sequence[Path], path: Path, facts: Mapping[str, Any]) -> Path:
    from diffusion.images import decode_image, labelled_grid

    labels = [job.prompt for job in jobs]
    recipe = {"prompts": labels, "pictures": [picture.name for picture in pictures], **facts}
    if (found := _written(path, recipe)) is not None:
        return found
    sheet = labelled_grid([decode_image(picture) for picture in pictures], labels, columns=_GRID_COLUMNS)
    return save_png(sheet, path, recipe)
