"""Native files to diffusers folders, pipelines and single files, and back; every tensor survives bit for bit."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoints.files import PIPELINE_PARTS, locate_pipeline
from diffusion.checkpoints.folders import new_file, new_folder
from diffusion.checkpoints.keys import config_to_diffusers, predicts
from diffusion.checkpoints.opening import Checkpoint, open_checkpoint
from diffusion.checkpoints.recognition import Found
from diffusion.checkpoints.weights import (
    CONFIG_IN_METADATA,
    PREDICTION_IN_METADATA,
    SPEC_PREDICTIONS,
    require_marked,
    save_tensors,
    write_transformer,
)
from diffusion.errors import CheckpointError
from diffusion.models import PixArt

OFFICIAL_PARTS = {
    "alpha": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "sigma": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
}
_POSITIONS, _NULL_CAPTION = "pos_embed", "y_embedder.y_embedding"


def require_flags(found: Found, source: str, *, multi_scale_train: bool | None = None, **options: bool) -> None:
    """Compare what a person says about a checkpoint with what it is.

    Args:
        multi_scale_train: True wants the size conditions that every 1024 px model of alpha has; elsewhere the two
            networks have the same weights. options: micro_condition, qk_norm, kv_compress; False says nothing.
    Raises:
        CheckpointError: they differ.
    """
    config = found.config
    for name, wanted in options.items():
        if wanted and not getattr(config, name):
            raise CheckpointError(f"{source} has no {name}; leave --{name} out")
    if found.family == "alpha" and found.image_size == 1024 and multi_scale_train not in (None, config.micro_condition):
        has = "has" if config.micro_condition else "has no"
        raise CheckpointError(
            f"{source} {has} size conditions (csize_embedder, ar_embedder), as --multi_scale_train="
            f"{config.micro_condition} would say; mend the flag or leave it out"
        )


def write_diffusers(
    checkpoint: Checkpoint, dump_path: str | Path, *, dtype: torch.dtype | None = None, parts: str | Path | None = None
) -> Path:
    """A new folder with `transformer/`, or with `parts` a whole pipeline; written aside, then renamed.

    What diffusers has no key for (the null caption; a position table that we would not make) lies beside the weights.

    Args:
        dtype: of the network's weights; None = as they are.
        parts: pipeline folder or hub id that gives tokenizer, text encoder, VAE and scheduler.
    Raises:
        CheckpointError: diffusers has no place for qk_norm or KV compression, a ControlNet, the folder exists, or
            `parts` is no pipeline. StorageError: the disk is full.
    """
    _require_transformer(checkpoint)
    config_to_diffusers(checkpoint.found.config)  # refuses before anything is downloaded or copied
    pipeline = None if parts is None else _require_pipeline(locate_pipeline(parts))
    with new_folder(dump_path) as folder:
        if pipeline is not None:
            _copy_parts(pipeline, folder, checkpoint.found)
        state_dict = _cast(checkpoint.state_dict, dtype)
        kept = [_NULL_CAPTION] if _NULL_CAPTION in state_dict else []
        table = state_dict.get(_POSITIONS)
        if table is not None and not _same(table, _cast({_POSITIONS: _positions(checkpoint)}, table.dtype)[_POSITIONS]):
            kept.append(_POSITIONS)
        write_transformer(state_dict, checkpoint.found.config, folder / "transformer", native_only=kept)
    return Path(dump_path)


def write_native(checkpoint: Checkpoint, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """A file in native names, as the original loads it: `.pth` with `state_dict`, or `.safetensors` with ModelSpec.

    The position table is there (ComfyUI reads the image size from it); the null caption, where the source has one.

    Raises:
        CheckpointError: another suffix, the file exists, a ControlNet, or a `.pth` of a network that does not predict
            noise. StorageError: the disk is full.
    """
    _require_transformer(checkpoint)
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise CheckpointError(f"{path} must end with .pth or .safetensors")
    require_marked(path, checkpoint.found.config)
    given = checkpoint.state_dict
    dtype_of_table = given["x_embedder.proj.weight"].dtype
    table = given.get(_POSITIONS)
    table = _positions(checkpoint).to(dtype_of_table) if table is None else table
    state_dict = _cast({_POSITIONS: table, **given}, dtype)
    with new_file(path) as aside:
        if path.suffix == ".pth":
            torch.save({"state_dict": state_dict}, aside)
        else:
            metadata = {
                CONFIG_IN_METADATA: json.dumps(asdict(checkpoint.found.config)),
                **model_spec(checkpoint.found, path.stem),
            }
            save_tensors(state_dict, aside, metadata)
    return path


def model_spec(found: Found, title: str) -> dict[str, str]:
    """Header entries by which user interfaces tell models apart (Stability-AI/ModelSpec 1.0.1)."""
    size = f"{found.image_size}x{found.image_size}"
    xl = "-xl-2" if found.config.hidden_size == 1152 else ""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"pixart-{found.family}{xl}",
        "modelspec.implementation": f"https://github.com/PixArt-alpha/PixArt-{found.family}",
        "modelspec.title": title,
        "modelspec.resolution": size,
        "modelspec.date": datetime.date.today().isoformat(),
        "modelspec.description": found.describe(),
        PREDICTION_IN_METADATA: SPEC_PREDICTIONS[found.config.prediction_type],
    }


def convert_by_flags(args: Any) -> None:
    """What the tools to diffusers do with their flags (`conversion_parser`, `pipeline_parser`): open, check, write.

    Raises:
        CheckpointError: see `open_checkpoint`, `require_flags` and `write_diffusers`.
    """
    checkpoint = open_checkpoint(
        args.orig_ckpt_path,
        ema=args.ema,
        image_size=args.image_size,
        family=args.version,
        num_heads=args.num_heads,
        untold_image_size=args.untold_image_size,
        untold_family=args.untold_family,
    )
    found = checkpoint.found
    print(f"found: {found.describe()}")
    flags = {name: getattr(args, name) for name in ("micro_condition", "qk_norm", "kv_compress")}
    require_flags(found, args.orig_ckpt_path, multi_scale_train=args.multi_scale_train, **flags)
    if args.only_transformer and args.pipeline_load_from is not None:
        raise CheckpointError(
            "--pipeline_load_from is read only with --only_transformer=False; add that or leave it out"
        )
    parts = None if args.only_transformer else args.pipeline_load_from or OFFICIAL_PARTS[found.family]
    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(f"written: {write_diffusers(checkpoint, args.dump_path, dtype=dtype, parts=parts)}")
    if args.single_file is not None:
        print(f"written: {write_native(checkpoint, args.single_file, dtype=dtype)}")


def _require_transformer(checkpoint: Checkpoint) -> None:
    if checkpoint.control:
        raise CheckpointError(
            f"{checkpoint.source} is a ControlNet, for which diffusers has no network; use its .pth as it is"
        )


def _positions(checkpoint: Checkpoint) -> Tensor:
    """The position table of the checkpoint's config, in float32."""
    with torch.device("meta"):
        model = PixArt(**{**vars(checkpoint.found.config), "depth": 1, "kv_compress": None})
    return model.to_empty(device="cpu").position_embedding()


def _cast(state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in state_dict.items()}


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _require_pipeline(folder: Path) -> Path:
    """A folder that has model_index.json and every part beside the transformer."""
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no pipeline folder (no model_index.json); give a diffusers pipeline")
    missing = [name for name in PIPELINE_PARTS if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; give a complete diffusers pipeline")
    return folder


def _copy_parts(pipeline: Path, folder: Path, found: Found) -> None:
    """Everything but the transformer, byte for byte, and the index that names the pipeline's classes.

    The scheduler is told what the transformer predicts. Raises CheckpointError where it cannot be.
    """
    for name in PIPELINE_PARTS:
        shutil.copytree(pipeline / name, folder / name)  # follows the links of the hub's cache
    path, kind = folder / "scheduler" / "scheduler_config.json", found.config.prediction_type
    scheduler = json.loads(path.read_text(encoding="utf-8"))
    if predicts(scheduler) != kind:
        if "flow" in (predicts(scheduler), kind):
            raise CheckpointError(
                f"{pipeline} has a scheduler for {predicts(scheduler)}, the transformer predicts {kind}; open both by "
                "PixArtPipeline.from_pretrained(parts, transformer=...), which sets one up, and save_pretrained"
            )
        path.write_text(json.dumps({**scheduler, "prediction_type": kind}, indent=2) + "\n", encoding="utf-8")
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    index |= {
        "_class_name": "PixArtSigmaPipeline" if found.family == "sigma" else "PixArtAlphaPipeline",
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
