"""A file of prompts to a folder of pictures."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusion.checkpoints.files import locate
from diffusion.checkpoints.hub import parse_hub_id
from diffusion.errors import CheckpointError, DataError, PromptError
from diffusion.inference.fast import padded_length
from diffusion.inference.folders import pipeline_folder
from diffusion.inference.memory import ENCODE_BATCH
from diffusion.inference.pipeline import PixArtPipeline, StepCallback
from diffusion.inference.recipe import library_versions, model_fingerprint, read_recipe, save_png
from diffusion.inference.sizes import parse_directives
from diffusion.ranks import Ranks

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


def load_pipeline(
    model_path: str | Path,
    parts: str | Path,
    *,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    **options: Any,
) -> PixArtPipeline:
    """A pipeline from a pipeline folder, or from a transformer plus the parts of another.

    Both may be names of the hub (`owner/name`, for a weight file `owner/name/file`). A transformer is a folder, a
    `checkpoint-N`, or a native weight file; with a file the pipeline follows the original's conventions
    (`PipelineParts.use_native_conventions`).

    Args:
        parts: pipeline folder with tokenizer, text encoder and VAE, for a model_path that has none.
        text_encoder, vae: folders of these parts alone, before all others.
        options: of `PixArtPipeline.from_pretrained`.
    Raises:
        CheckpointError: a folder or a part of it is missing.
    """
    hub_id = parse_hub_id(model_path)
    model_path = pipeline_folder(model_path) if hub_id is None or hub_id[1] is None else locate(model_path)
    parts = pipeline_folder(parts)
    if not model_path.exists():
        raise CheckpointError(
            f"model_path {model_path} does not exist; give a pipeline folder, a checkpoint-N, a weight file, or a "
            "model of the hub such as PixArt-alpha/PixArt-XL-2-512x512"
        )
    if text_encoder is not None and (inner := Path(text_encoder) / "t5-v1_1-xxl").is_dir():
        text_encoder = inner  # the original's --t5_path is the folder around it
    folders = {"text_encoder": text_encoder, "vae": vae}
    given: dict[str, Any] = {name: folder for name, folder in folders.items() if folder is not None} | options
    if (model_path / "text_encoder").is_dir() or (text_encoder is not None and (model_path / "vae").is_dir()):
        return PixArtPipeline.from_pretrained(model_path, **given)
    if not parts.is_dir() and (text_encoder is None or vae is None):
        raise CheckpointError(
            f"pipeline_load_from {parts} is no folder; {model_path} needs tokenizer, T5 and VAE from it"
        )
    pipeline = PixArtPipeline.from_pretrained(parts, transformer=model_path, **given)
    if model_path.is_file():
        pipeline.use_native_conventions()
    return pipeline


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
    callback_on_step_end: StepCallback | None = None,
    free_text_encoder: bool = False,
    ranks: Ranks | None = None,
) -> tuple[list[Path], Path | None]:
    """Draw every prompt and write `000-slug.png`, ... with recipes; picture k of all has seed + k at any batch size.

    All prompts are encoded before the first picture is drawn, so T5 need not share the device with the network.
    A picture that an earlier call wrote with the same recipe is kept, so an interrupted call goes on where it stopped.
    Directives in a prompt (`--ar 9:16`, see `parse_directives`) decide its size.

    Args:
        model: how the recipe names the model.
        num_images: pictures a prompt.
        grid: also write `grid.png`, all pictures labelled with their prompts.
        settings: further arguments of the pipeline's call.
        callback_on_step_end: see the pipeline's call; it does not enter the recipes.
        free_text_encoder: let T5 go once the prompts are encoded, from the host's memory too.
        ranks: of a pipeline that shares its work: all of them make this call, the main one reads and writes the folder.
    Returns:
        the pictures' paths, and the grid's or None.
    Raises:
        PromptError: batch_size or num_images below 1, or a setting outside its range.
    """
    require_at_least_1({"batch size": batch_size, "num_images": num_images})
    folder, settings, on_main = Path(folder), dict(settings or {}), _on_main(ranks)
    facts = recipe_facts(pipeline, model, controlled=settings.get("control_image") is not None)
    jobs = [
        _job(pipeline, folder, number, prompt, seed + number, settings, facts)
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(num_images))
    ]
    paths = on_main(lambda: {job.number: found for job in jobs if (found := _written(job.path, job.recipe))})
    todo = [job for job in jobs if job.number not in paths]
    if paths:
        _logger.info("%d of %d pictures are already in %s", len(paths), len(jobs), folder)
    captions = _encode(pipeline, todo)
    if free_text_encoder:
        pipeline.free_text_encoder()
    fast = pipeline.fast_settings is not None
    batches = list(_batches(todo, batch_size, captions if fast else {}))
    for batch, output in zip(batches, pipeline.stream(_calls(batches, captions, callback_on_step_end, fill=fast))):
        for job, image in zip(batch, output.images):
            paths[job.number] = on_main(partial(save_png, image, job.path, job.recipe))
    done = [paths[job.number] for job in jobs]
    return done, on_main(lambda: _write_grid(jobs, done, folder / "grid.png", facts)) if grid else None


def require_at_least_1(counts: Mapping[str, int | None]) -> None:
    """Refuse counts below 1 by their names; None = not given.

    Raises:
        PromptError: the first of them.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise PromptError(f"{name} {value} must be at least 1")


def _on_main(ranks: Ranks | None) -> Callable[[Callable[[], Any]], Any]:
    return (lambda function: function()) if ranks is None else ranks.on_main


@dataclass(frozen=True)
class _Job:
    """One picture to be drawn; settings: of the pipeline's call, its size among them."""

    number: int
    path: Path
    prompt: str
    seed: int
    settings: dict[str, Any]
    recipe: dict[str, Any]


def recipe_facts(pipeline: PixArtPipeline, model: str, *, controlled: bool) -> dict[str, Any]:
    """What all recipes of a call say beside the request."""
    plan = pipeline.memory_plan
    steering: dict[str, Any] = {}
    if controlled and pipeline.controlnet is not None:
        steering["controlnet_fingerprint"] = model_fingerprint(pipeline.controlnet.controlnet)  # its base is the model
    if controlled and pipeline.edge_detector is not None:
        steering["edge_detector_fingerprint"] = model_fingerprint(pipeline.edge_detector)
    if pipeline.fused_loras:
        steering["loras"] = list(pipeline.fused_loras)
    fast = pipeline.fast_settings
    if fast is not None and (changes := fast.changes()):
        steering["fast"] = changes
    return {
        **steering,
        "model": model,
        "model_fingerprint": model_fingerprint(pipeline.transformer),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "memory": None if plan is None else plan.name,
        "versions": library_versions(),
    }


def _job(
    pipeline: PixArtPipeline,
    folder: Path,
    number: int,
    prompt: str,
    seed: int,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> _Job:
    sized = parse_directives(prompt, pipeline.default_size)
    own = {**settings, **sized.settings}
    recipe = pipeline.recipes([sized.text], seed=[seed], **own)[0]
    path = folder / f"{number:03d}-{slug(sized.text)}.png"
    return _Job(number, path, sized.text, seed, own, {**recipe, **facts})


def _encode(pipeline: PixArtPipeline, jobs: Sequence[_Job]) -> dict[str, Tensor]:
    """Each prompt and negative prompt of the jobs as (L, C) on the CPU, padding cut off."""
    texts = dict.fromkeys(job.prompt for job in jobs)
    texts |= dict.fromkeys(job.recipe["negative_prompt"] for job in jobs if _needs_negative(job))
    clean = any(job.recipe.get("clean_caption", False) for job in jobs)  # one setting for all
    encoded: dict[str, Tensor] = {}
    for start in range(0, len(texts), ENCODE_BATCH):
        chunk = list(texts)[start : start + ENCODE_BATCH]
        embeds, mask = pipeline.encode_captions(chunk, clean_caption=clean)
        encoded |= {text: rows[kept].cpu() for text, rows, kept in zip(chunk, embeds, mask)}
    return encoded


def _needs_negative(job: _Job) -> bool:
    return bool(job.recipe["null_caption"] == "t5_empty" and job.recipe["guidance_scale"] > 1)


def _batches(jobs: Sequence[_Job], batch_size: int, captions: Mapping[str, Tensor]) -> Iterator[list[_Job]]:
    """Jobs of one size, `batch_size` at a time; the order within a size is kept.

    captions: where given, also of one padded length, since each has its own compiled kernels and graph.
    """
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        drawn = (job.recipe["height"], job.recipe["width"], str(job.recipe.get("drawn_size")))
        length = padded_length(len(captions[job.prompt])) if captions else None
        groups.setdefault((drawn, length), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _calls(
    batches: Sequence[list[_Job]], captions: Mapping[str, Tensor], callback: StepCallback | None, *, fill: bool
) -> Iterator[dict[str, Any]]:
    """Arguments of the pipeline's call for each batch.

    fill: repeat the last picture of a smaller batch, whose size would be compiled for it alone.
    """
    full = max(map(len, batches), default=0)
    for batch in batches:
        drawn = batch + [batch[-1]] * (full - len(batch)) if fill else batch
        seeds = [job.seed for job in drawn]
        yield {**batch[0].settings, **_embeddings(drawn, captions), "seed": seeds, "callback_on_step_end": callback}


def _embeddings(batch: Sequence[_Job], captions: Mapping[str, Tensor]) -> dict[str, Any]:
    """The captions of a batch as arguments of the pipeline's call."""

    def padded(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [captions[text] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        embeds = pad_sequence(rows, batch_first=True)  # (B, L, C)
        return embeds, torch.arange(embeds.shape[1]) < lengths[:, None]

    embeds, mask = padded([job.prompt for job in batch])
    given: dict[str, Any] = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    if _needs_negative(batch[0]):
        embeds, mask = padded([batch[0].recipe["negative_prompt"]])
        given |= {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    return given


def _written(path: Path, wanted: Mapping[str, Any]) -> Path | None:
    """`path`, or its numbered sibling, where an earlier call wrote this recipe; drawing it again changes nothing."""
    numbered = (path.with_name(f"{path.stem}-{number}.png") for number in itertools.count(2))
    for candidate in itertools.takewhile(Path.exists, itertools.chain([path], numbered)):
        try:
            recipe = read_recipe(candidate)
        except DataError:
            continue
        if recipe == wanted:  # the whole: what only the other call asked for has changed that picture
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
