"""Where the weights of a checkpoint lie: files, folders of diffusers, `checkpoint-N`, ids of the hub."""

from __future__ import annotations

from pathlib import Path

from diffusion.checkpoints.hub import hub_file, hub_folder, parse_hub_id
from diffusion.checkpoints.training_state import MANIFEST, verify
from diffusion.errors import CheckpointError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
NULL_CAPTION_NAME = "null_caption.safetensors"
ALIGNMENT_HEAD_NAME = "alignment_head.safetensors"
FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
PIPELINE_PARTS = ("tokenizer", "text_encoder", "vae", "scheduler")  # and the transformer
_STEM = "diffusion_pytorch_model"


def locate(source: str | Path, *, variant: str | None = None, revision: str | None = None) -> Path:
    """The local file or folder of a checkpoint; a hub id is downloaded into the hub's cache.

    Args:
        source: file, folder, `owner/name`, or `owner/name/path/of/file`.
    Raises:
        CheckpointError: nothing there, here or on the hub.
    """
    path = Path(source)
    if path.exists():
        return path
    hub_id = parse_hub_id(source)
    if hub_id is None:
        raise CheckpointError(
            f"{source} holds no transformer: no such file or folder; give a weight file, a diffusers folder, a "
            "checkpoint-N or a hub id owner/name"
        )
    repo, name = hub_id
    if name is not None:
        return hub_file(repo, name, revision=revision)
    dotted = f".{variant}" if variant else ""
    wanted = ["config.json", NULL_CAPTION_NAME, f"{_STEM}{dotted}.safetensors", f"{_STEM}-*{dotted}.safetensors"]
    wanted += [f"{_STEM}{dotted}-*.safetensors", f"{_STEM}.safetensors.index{dotted}.json"]
    patterns = [f"{folder}{name}" for folder in ("", "transformer/") for name in wanted]
    patterns += ["model_index.json", "scheduler/scheduler_config.json"]
    return hub_folder(
        repo, patterns, f"transformer folder{f' of variant {variant!r}' if variant else ''}", revision=revision
    )


def find_transformer_folder(path: str | Path, *, ema: bool = False, variant: str | None = None) -> Path:
    """The folder with a transformer's config.json inside a pipeline folder, a `checkpoint-N`, or the folder itself.

    Args:
        ema: prefer the averaged weights, where the folder has them.
        variant: of the weight files' names, e.g. "fp16".
    Raises:
        CheckpointError: nothing there, or a `checkpoint-N` with missing or cut files.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() and (problem := verify(path, hashes=False)) is not None:
        raise CheckpointError(f"{path} is damaged: {problem}; use another checkpoint")
    candidates = ([path / "transformer_ema"] if ema else []) + [path / "transformer", path]
    for candidate in candidates:
        if (candidate / "config.json").is_file() and weight_files(candidate, variant):
            return candidate
    raise CheckpointError(_nothing_there(path, candidates, variant))


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Files of diffusers weights in a folder, the one to read first; an index stands for its shards.

    safetensors before torch files, whole ones before shards.
    """
    dotted = f".{variant}" if variant else ""
    names = [f"{_STEM}{dotted}.safetensors", f"{_STEM}.safetensors.index{dotted}.json"]
    names += [f"{_STEM}{dotted}.bin", f"{_STEM}.bin.index{dotted}.json"]
    return [folder / name for name in names if (folder / name).is_file()]


def _nothing_there(path: Path, candidates: list[Path], variant: str | None) -> str:
    """Why a folder has no transformer, and what to do."""
    if not path.is_dir():
        return f"{path} holds no transformer: no such folder"
    if (path / "controlnet").is_dir():
        return f"{path} holds the branch of a ControlNet; give it as --controlnet beside the base it was trained on"
    if (path / "adapter_config.json").is_file():
        return f"{path} holds an adapter (LoRA), which changes a model and is none; give its base model"
    if stray := sorted(file.name for file in path.iterdir() if file.suffix in FILE_SUFFIXES):
        stray = [name for name in stray if not name.startswith(_STEM)]
        if stray:
            return f"{path} holds no transformer folder; give one of its files instead: {', '.join(stray)}"
    for folder in candidates:
        variants = sorted({_variant_of(file.name) or "" for file in folder.glob(f"{_STEM}*")} - {variant or ""})
        if variants and (folder / "config.json").is_file():
            given = "no variant" if variant is None else f"no variant {variant!r}"
            there = ", ".join(f"variant {name!r}" if name else "those without variant" for name in variants)
            return f"{folder} has weights of {given}, only {there}; give the one that is there"
    return (
        f"{path} holds no transformer: expected transformer/config.json and transformer/{WEIGHTS_NAME} "
        "(a diffusers pipeline folder, or a checkpoint-N of a run)"
    )


def _variant_of(name: str) -> str | None:
    """The variant in the name of a diffusers weight file: diffusion_pytorch_model[.fp16][-1-of-2].safetensors."""
    known = {"safetensors", "bin", "index", "json"}
    parts = [part.split("-")[0] for part in name.removeprefix(_STEM).split(".")]
    return next((part for part in parts if part and part not in known), None)


def locate_pipeline(source: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a pipeline's parts, without its transformer; a hub id is downloaded into the hub's cache.

    Raises:
        CheckpointError: nothing there, here or on the hub.
    """
    hub_id = parse_hub_id(source)
    if hub_id is None:
        if not Path(source).is_dir():
            raise CheckpointError(f"{source} is no folder; give a diffusers pipeline folder or a hub id owner/name")
        return Path(source)
    patterns = ["model_index.json", *(f"{name}/*" for name in PIPELINE_PARTS)]
    return hub_folder(hub_id[0], patterns, f"folders {', '.join(PIPELINE_PARTS)}", revision=revision)
