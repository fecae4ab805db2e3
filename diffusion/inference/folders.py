"""Pipeline folders in the layout of diffusers: reading a scheduler, writing a whole pipeline."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from diffusion.checkpoints import new_folder, save_transformer
from diffusion.checkpoints.hub import cached_file, hub_file, hub_folder, parse_hub_id
from diffusion.checkpoints.opening import read_json
from diffusion.checkpoints.published import find_published
from diffusion.errors import CheckpointError
from diffusion.inference.solvers import make_scheduler, stock_scheduler

if TYPE_CHECKING:
    from diffusion.inference.parts import PipelineParts

GUIDANCE_SCALE = 4.5  # of the paper's models
PARTS = ("text_encoder", "transformer", "vae")  # those with weights
_PIPELINE_FILES = ("*.json", "*.model", "*model.safetensors", "*model-0*.safetensors")
_MODEL_INDEX = {
    "_class_name": "PixArtAlphaPipeline",
    "_diffusers_version": diffusers.__version__,
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def pipeline_folder(name: str | Path, *, variant: str | None = None, revision: str | None = None) -> Path:
    """A local folder as it is, or the downloaded files of a model on the hub, as "PixArt-alpha/PixArt-XL-2-512x512".

    Files of the hub's cache are used when the network is absent (or HF_HUB_OFFLINE is set); HF_HOME and HF_ENDPOINT
    count.

    Args:
        variant: of weight files ("fp16"); parts without it are fetched as they are. revision: of the repository.
    Raises:
        CheckpointError: neither a folder nor a hub model that can be had.
    """
    hub_id = parse_hub_id(name)
    if hub_id is None:
        return Path(name)
    repo, inner = hub_id
    what = "folders of a pipeline"
    if variant is None:
        return hub_folder(repo, _PIPELINE_FILES, what, revision=revision) / (inner or "")
    files = ("*.json", "*.model", f"*model.{variant}*safetensors")
    folder = hub_folder(repo, files, what, revision=revision) / (inner or "")
    if plain := [part for part in PARTS if (folder / part).is_dir() and part_variant(folder, part, variant) is None]:
        inner = f"{inner}/" if inner else ""
        patterns = [f"{inner}{part}/{name}" for part in plain for name in _PIPELINE_FILES]
        hub_folder(repo, patterns, what, revision=revision)
    return folder


def part_variant(folder: str | Path, name: str, variant: str | None) -> str | None:
    """The variant where a part (`name` in a pipeline folder, or the folder itself) has weights of it.

    None = its plain files, as diffusers mixes them. A hub id that is yet to be fetched keeps the variant.
    """
    root = Path(folder)
    part = root / name if (root / name).is_dir() else root
    if variant is None or (part.is_dir() and not any(part.glob(f"*.{variant}[.-]*"))):
        return None
    return variant


def require_files(folder: Path, *, variant: str | None, safetensors_only: bool) -> None:
    """Refuse a pipeline folder without its index, one none of whose parts has the variant, or one with a part in other
    files than asked for.

    Raises:
        CheckpointError: naming the part and what it holds.
    """
    names = [part for part in PARTS if (folder / part).is_dir()]
    if len(names) == len(PARTS) and not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} has the parts of a pipeline but no model_index.json, which says how they are used; copy it from "
            "where they are from"
        )
    if variant is not None and names and not any(part_variant(folder, part, variant) for part in names):
        raise CheckpointError(f"{folder} has no weights of variant {variant!r}; leave variant out, or give one it has")
    for part in (folder / name for name in names):
        if safetensors_only and not any(part.glob("*.safetensors")):
            others = ", ".join(sorted(path.name for path in part.glob("*.bin"))) or "no weights"
            raise CheckpointError(
                f"{part} has {others}, and use_safetensors=True asks for .safetensors; leave it out to open the others "
                "(no code in them runs)"
            )


def published_pipeline(name: str, *, fetch: bool = False) -> Path | None:
    """The folder of a published pipeline in the hub's cache; None = not all of its parts are there.

    Args:
        fetch: ask the hub for what is missing; without it nothing is fetched.
    Raises:
        CheckpointError: it cannot be fetched.
    """
    repo = find_published(name).repo
    if fetch:
        return pipeline_folder(repo)
    index = cached_file(repo, "model_index.json")
    if index is None or not all(_has_weights(index.parent / part) for part in PARTS):
        return None
    return index.parent


def published_file(name: str, *, fetch: bool = False) -> Path | None:
    """A published file in the hub's cache, as `published_pipeline`."""
    row = find_published(name)
    return hub_file(row.repo, row.pattern) if fetch else cached_file(row.repo, row.pattern)


def _has_weights(part: Path) -> bool:
    """Whether a download of a part was finished: one weight file, or all shards of its index."""
    for index in part.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((part / shard).is_file() for shard in shards)
    return any(part.glob("*model.safetensors"))


def usual_guidance(folder: str | Path) -> float:
    """The guidance scale that a model is best drawn with, from `_guidance_scale` of its model_index.json; else 4.5.

    Names with an underscore are passed over by stock diffusers.

    Raises:
        CheckpointError: it is no number >= 0, or the file no JSON.
    """
    path = Path(folder) / "model_index.json"
    if not path.is_file():
        return GUIDANCE_SCALE
    value = read_json(path).get("_guidance_scale", GUIDANCE_SCALE)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise CheckpointError(f"{path}: _guidance_scale {value!r} must be a number >= 0; correct it or take it out")
    return float(value)


def load_scheduler(folder: str | Path, algorithm: str | None = None) -> Any:
    """The scheduler that a pipeline folder names, or another algorithm on the folder's noise process.

    Raises:
        CheckpointError: no readable scheduler config, or of a class that diffusers lacks.
        PromptError: unknown algorithm.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    if algorithm is not None and not path.is_file():
        return make_scheduler(algorithm)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); copy the model's scheduler folder there") from error
    if algorithm is not None:
        return make_scheduler(algorithm, base_config=config)
    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "set_timesteps"):
        raise CheckpointError(f"{path} names {name!r}, which is no scheduler of diffusers; choose an algorithm by name")
    return cls.from_config(config)


def save_pipeline(pipeline: PipelineParts, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that stock diffusers opens as `PixArtAlphaPipeline`; written aside, then renamed.

    Args:
        dtype: of the weights in the files; None = as in memory.
    Raises:
        CheckpointError: the folder exists and is not empty. StorageError: the disk is full or not writable.
    """
    with new_folder(folder) as aside:
        _write_parts(pipeline, aside, dtype)


def _write_parts(pipeline: PipelineParts, folder: Path, dtype: torch.dtype | None) -> None:
    pipeline.tokenizer.save_pretrained(str(folder / "tokenizer"))
    # transformers 5 does without the vocabulary of sentencepiece, which older versions ask for.
    vocabulary = getattr(pipeline.tokenizer, "vocab_file", None)
    if vocabulary is not None and Path(vocabulary).is_file():
        shutil.copyfile(vocabulary, folder / "tokenizer" / Path(vocabulary).name)
    for name in ("text_encoder", "vae"):
        module = getattr(pipeline, name)
        if dtype is not None and module.dtype != dtype:
            module = copy.deepcopy(module).to(dtype)
        module.save_pretrained(str(folder / name))
    # transformers loads T5 in the type that its config names, the others come in float32: unless told, all are alike.
    described = folder / "text_encoder" / "config.json"
    described.write_text(re.sub(r'"dtype": "\w+"', '"dtype": "float32"', described.read_text(encoding="utf-8")))
    network = pipeline.transformer
    has_stored_null = bool(network.y_embedder.y_embedding.any())
    save_transformer(network, folder / "transformer", dtype=dtype, stored_null_caption=has_stored_null)
    scheduler = stock_scheduler(pipeline.scheduler)
    scheduler.save_pretrained(str(folder / "scheduler"))
    index: dict[str, Any] = {**_MODEL_INDEX, "scheduler": ["diffusers", type(scheduler).__name__]}
    if pipeline.usual_guidance != GUIDANCE_SCALE:
        index["_guidance_scale"] = pipeline.usual_guidance
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
