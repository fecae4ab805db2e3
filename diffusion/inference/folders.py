"""Pipeline folders in the layout of diffusers: reading a scheduler, writing a whole pipeline."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from diffusion.checkpoints import new_folder, save_transformer
from diffusion.checkpoints.hub import cached_file, hub_file, hub_folder, parse_hub_id
from diffusion.checkpoints.published import find_published
from diffusion.errors import CheckpointError
from diffusion.inference.solvers import make_scheduler, stock_scheduler

if TYPE_CHECKING:
    from diffusion.inference.parts import PipelineParts

_PIPELINE_FILES = ("*.json", "*.model", "*model.safetensors", "*model-0*.safetensors")
_MODEL_INDEX = {
    "_class_name": "PixArtAlphaPipeline",
    "_diffusers_version": diffusers.__version__,
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def pipeline_folder(name: str | Path) -> Path:
    """A local folder as it is, or the downloaded files of a model on the hub, as "PixArt-alpha/PixArt-XL-2-512x512".

    Files of the hub's cache are used when the network is absent (or HF_HUB_OFFLINE is set); HF_HOME and HF_ENDPOINT
    count.

    Raises:
        CheckpointError: neither a folder nor a hub model that can be had.
    """
    hub_id = parse_hub_id(name)
    if hub_id is None:
        return Path(name)
    repo, inner = hub_id
    return hub_folder(repo, _PIPELINE_FILES, "folders of a pipeline") / (inner or "")


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
    if index is None or not all(_has_weights(index.parent / part) for part in ("transformer", "text_encoder", "vae")):
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
    for name in ("text_encoder", "vae"):
        module = getattr(pipeline, name)
        if dtype is not None and module.dtype != dtype:
            module = copy.deepcopy(module).to(dtype)
        module.save_pretrained(str(folder / name))
    network = pipeline.transformer
    has_stored_null = bool(network.y_embedder.y_embedding.any())
    save_transformer(network, folder / "transformer", dtype=dtype, stored_null_caption=has_stored_null)
    scheduler = stock_scheduler(pipeline.scheduler)
    scheduler.save_pretrained(str(folder / "scheduler"))
    index = {**_MODEL_INDEX, "scheduler": ["diffusers", type(scheduler).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
