"""One way to open any PixArt checkpoint: native files, single files, diffusers folders, hub ids, `checkpoint-N`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoints.dit import DIT_CLASS, dit_from_fields, is_dit, recognise_dit
from diffusion.checkpoints.files import (
    ALIGNMENT_HEAD_NAME,
    NULL_CAPTION_NAME,
    find_transformer_folder,
    locate,
    weight_files,
)
from diffusion.checkpoints.keys import (
    NATIVE_ONLY,
    TRAINING_ONLY,
    config_from_diffusers,
    diffusers_to_native,
    flow_shift_of,
    predicts,
)
from diffusion.checkpoints.recognition import (
    VAE_FACTOR,
    Found,
    common_prefix,
    control_blocks,
    default_tokens,
    family_of,
    is_diffusers,
    recognise,
    require_pixart,
    tells_image_size,
)
from diffusion.checkpoints.tensors import Renamed, TensorFile, read_tensors
from diffusion.checkpoints.weights import CONFIG_IN_METADATA, load_weights, materialize_buffers, require_fit
from diffusion.errors import CheckpointError
from diffusion.models import PREDICTION_TYPES, ControlPixArt, DiTConfig, PixArt, PixArtConfig

_BASE, _CONTROL = "base_model.", "controlnet."
# Weights of a file that are left out, and why.
_DROPPED = {r"(^|\.)attn\.rel_pos_[hw]$": "relative positions, which the original allocates and never reads"}


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint under native names, before anything is known about them.

    Args:
        layout: names in the file, "native" or "diffusers"; "dit" for a class-conditional DiT in the names of its files.
        control: of a ControlNet file, the names that begin with `controlnet.`.
        config: what the checkpoint states about itself; None for files that hold tensors alone. dit: the same of a DiT.
        pipeline: model_index.json of the pipeline around it, {} for none; "scheduler" is its scheduler's config.
        num_keys: of the file as it stands.
    """

    source: str
    layout: str
    state_dict: dict[str, Tensor]
    control: dict[str, Tensor]
    config: PixArtConfig | None
    pipeline: dict[str, Any]
    num_keys: int
    notes: list[str] = field(default_factory=list)
    dit: DiTConfig | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it is, and weights that were compared with that, key by key.

    Args:
        state_dict: native names; of a ControlNet file, those of its base model.
        control: the control blocks of a ControlNet file, with the names of the file.
    """

    source: str
    found: Found
    state_dict: dict[str, Tensor]
    control: dict[str, Tensor]

    def build(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32) -> PixArt:
        """The network in eval mode; on the CPU it shares memory with `state_dict` where the dtype is the same.

        Args:
            dtype: None = as stored.
        """
        return self._build().to(device=device, dtype=dtype).eval()

    def build_control(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        *,
        base: PixArt | None = None,
    ) -> ControlPixArt:
        """The ControlNet with its base model, in eval mode.

        Args:
            base: this network, which is frozen, in place of the base in the file.
        Raises:
            CheckpointError: the file is a plain transformer, or `base` is another kind of model than the file's.
        """
        if not self.control:
            raise CheckpointError(f"{self.source} is a transformer without control blocks; give a ControlNet file")
        if base is not None:
            require_kind(self.found.config, base.config, self.source)
        try:
            with torch.device("meta"):
                model = ControlPixArt(PixArt(**vars(self.found.config)), self.found.control_blocks)
        except ValueError as error:
            raise CheckpointError(f"{self.source} is no ControlNet of its base: {error}") from error
        model.controlnet.load_state_dict(
            {key.removeprefix(_CONTROL): tensor for key, tensor in self.control.items()}, assign=True
        )
        model.base_model = self._build() if base is None else base
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def _build(self) -> PixArt:
        with torch.device("meta"):
            model = PixArt(**vars(self.found.config))
        load_weights(model, self.state_dict, self.source, assign=True)
        materialize_buffers(model)
        return model


def open_checkpoint(
    source: str | Path,
    *,
    ema: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    family: str | None = None,
    num_heads: int | None = None,
    pe_interpolation: float | None = None,
    untold_image_size: int | None = None,
    untold_family: str | None = None,
) -> Checkpoint:
    """Open a checkpoint of any kind, recognise it and compare every key and shape with what it was recognised as.

    Args:
        source: `.pth` (bare, or `state_dict` with an optimiser beside it), safetensors in native or diffusers names,
            diffusers transformer or pipeline folder, `checkpoint-N`, hub id `owner/name[/file]`.
        ema: the averaged weights; a folder that has none gives the others.
        variant, revision: of a diffusers folder's files, and of a hub repository.
        image_size, family, num_heads, pe_interpolation: what a file may not tell; see `recognise`.
        untold_image_size, untold_family: image size, px, and family of a file that tells none; they do not contradict
            one that does.
    Raises:
        CheckpointError: nothing there, damaged, code in a pickle, another kind of model, an argument that contradicts
            the weights, or keys that do not fit, all listed.
    """
    weights = read_weights(source, ema=ema, variant=variant, revision=revision)
    if weights.layout == "dit":
        raise CheckpointError(
            f"{source} is a class-conditional DiT, which knows no captions; tools/init_from_dit.py makes a PixArt of it"
        )
    if weights.config is None:
        family = untold_family if family is None else family
        if image_size is None and not tells_image_size(weights.state_dict):
            image_size = untold_image_size
    return _recognised(weights, image_size, family, num_heads, pe_interpolation)


def _recognised(
    weights: Weights,
    image_size: int | None = None,
    family: str | None = None,
    num_heads: int | None = None,
    pe_interpolation: float | None = None,
) -> Checkpoint:
    """Say what weights are, and compare them with that; see `open_checkpoint`."""
    state_dict = {key: tensor for key, tensor in weights.state_dict.items() if not key.startswith(TRAINING_ONLY)}
    notes = list(weights.notes)
    if weights.config is None:
        family, config, assumed = recognise(
            state_dict,
            weights.source,
            image_size=image_size,
            family=family,
            num_heads=num_heads,
            pe_interpolation=pe_interpolation,
        )
        notes += assumed
    else:
        family, config = _stated(weights, image_size, family)
        config = config if pe_interpolation is None else replace(config, pe_interpolation=pe_interpolation)
    with torch.device("meta"):
        expected = PixArt(**vars(config))
    require_fit(expected, state_dict, weights.source)
    tensors = [*state_dict.items(), *weights.control.items()]
    found = Found(
        family=family,
        layout=weights.layout,
        config=config,
        num_keys=weights.num_keys,
        num_parameters=sum(tensor.numel() for key, tensor in tensors if key not in NATIVE_ONLY),
        control_blocks=control_blocks(weights.control, state_dict, weights.source),
        lcm=_is_lcm(weights),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors})),
        notes=tuple(notes),
    )
    return Checkpoint(weights.source, found, state_dict, weights.control)


def require_kind(wanted: PixArtConfig, given: PixArtConfig, source: str | Path) -> None:
    """Refuse a base that a ControlNet was not made for; null caption and training options do not matter.

    Raises:
        CheckpointError: what differs.
    """
    other = [
        f"{field.name}={getattr(given, field.name)} instead of {getattr(wanted, field.name)}"
        for field in fields(PixArtConfig)
        if field.name not in ("model_max_length", "drop_path")
        and getattr(given, field.name) != getattr(wanted, field.name)
    ]
    if other:
        raise CheckpointError(
            f"{source} is the ControlNet of another kind of model: the base given has {', '.join(other)}; give the "
            f"{wanted.input_size * VAE_FACTOR} px model that it was trained on, or the ControlNet file alone"
        )


def read_transformer(path: str | Path, *, ema: bool = False) -> tuple[PixArtConfig | DiTConfig, dict[str, Tensor]]:
    """Config and native weights of a checkpoint of any kind, those that only training reads included."""
    weights = read_weights(path, ema=ema)
    if weights.layout == "dit":
        return weights.dit or recognise_dit(weights.state_dict, weights.source), weights.state_dict
    return _recognised(weights).found.config, weights.state_dict


def read_weights(
    source: str | Path, *, ema: bool = False, variant: str | None = None, revision: str | None = None
) -> Weights:
    """Weights of a checkpoint of any kind under native names, each read once; see `open_checkpoint`.

    Raises:
        CheckpointError: nothing there, damaged, or code in a pickle.
    """
    path = locate(source, variant=variant, revision=revision)
    config: PixArtConfig | None = None
    dit: DiTConfig | None = None
    pipeline: dict[str, Any] = {}
    beside: dict[str, Tensor] = {}
    if path.is_dir():
        folder = find_transformer_folder(path, ema=ema, variant=variant)
        tensors = read_tensors(weight_files(folder, variant)[0])
        described = read_json(folder / "config.json")
        if described.get("_class_name") == DIT_CLASS:
            dit = dit_from_fields(described, str(folder))
        else:
            config = config_from_diffusers(described)
        pipeline = _pipeline_around(folder)
        is_marked = "prediction_type" in described or CONFIG_IN_METADATA in getattr(tensors, "metadata", {})
        if config is not None and not is_marked and "scheduler" in pipeline:
            config = _with_scheduler(config, pipeline["scheduler"], folder)
        for name in (NULL_CAPTION_NAME, ALIGNMENT_HEAD_NAME):
            if (folder / name).is_file():
                beside |= TensorFile(folder / name)
    else:
        tensors = read_tensors(path, ema=ema)
    config = _with_metadata(config, tensors)
    layout, state_dict, notes = _native(tensors, str(source))
    control = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(_CONTROL)}
    if control:
        state_dict = {key.removeprefix(_BASE): tensor for key, tensor in state_dict.items()}
    state_dict |= beside
    return Weights(str(source), layout, state_dict, control, config, pipeline, len(tensors), notes, dit)


def _native(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Tensor], list[str]]:
    """Layout, weights under native names, and notes about names that were changed or left out."""
    notes = []
    prefix = common_prefix(tensors)
    if prefix:
        others = [key for key in tensors if not key.startswith(prefix)]
        notes.append(f"every key began with {prefix!r}" + (f"; {len(others)} others were left out" if others else ""))
        tensors = Renamed(tensors, {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)})
    if is_dit(tensors):
        return "dit", dict(tensors), notes
    if is_diffusers(tensors):
        return "diffusers", diffusers_to_native(tensors), notes
    kept = {key: key for key in tensors}
    for pattern, reason in _DROPPED.items():
        dropped = [key for key in kept if re.search(pattern, key)]
        if dropped:
            notes.append(f"{len(dropped)} keys were left out: {reason}")
            kept = {key: key for key in kept if key not in dropped}
    require_pixart([key.removeprefix(_BASE) for key in kept], source)
    return "native", dict(Renamed(tensors, kept)), notes


def _stated(weights: Weights, image_size: int | None, family: str | None) -> tuple[str, PixArtConfig]:
    """Family and config of a checkpoint that has a config, with the caption length its weights or family tell."""
    config = weights.config
    assert config is not None
    size = config.input_size * VAE_FACTOR
    if image_size is not None and image_size != size:
        raise CheckpointError(
            f"{weights.source} is a model for {size} px (its sample_size is {config.input_size}), not for "
            f"image_size={image_size}; give {size} or leave it out"
        )
    stored = weights.state_dict.get("y_embedder.y_embedding")
    if stored is not None:
        config = replace(config, model_max_length=stored.shape[0])
    elif family is None and _looks_like_sigma(config, weights.pipeline):
        family = "sigma"
    if family is None:
        family = family_of(config)
    if stored is None and family == "sigma":
        config = replace(config, model_max_length=default_tokens(family))
    return family, config


def _looks_like_sigma(config: PixArtConfig, pipeline: Mapping[str, Any]) -> bool:
    """Whether a diffusers folder without a null caption is Sigma's; its 512 px model alone has alpha's config."""
    if "Sigma" in str(pipeline.get("_class_name", "")):
        return True
    return config.pe_interpolation < 1 or (config.input_size >= 128 and not config.micro_condition)


def _is_lcm(weights: Weights) -> bool:
    """Keys do not tell an LCM from its teacher; the scheduler beside it or its name does."""
    name = weights.source.removesuffix("/transformer").rsplit("/", 1)[-1]
    scheduler = str(weights.pipeline.get("scheduler", {}).get("_class_name"))
    return "LCM" in scheduler or "lcm" in re.split(r"[-_. ]", name.lower())


def _pipeline_around(folder: Path) -> dict[str, Any]:
    """model_index.json beside or in a transformer folder, and the config of its scheduler; {} for none."""
    root = folder.parent if folder.name.startswith("transformer") else folder
    found: dict[str, Any] = {}
    if (root / "model_index.json").is_file():
        found |= {"_class_name": read_json(root / "model_index.json").get("_class_name")}
    if (root / "scheduler" / "scheduler_config.json").is_file():
        found |= {"scheduler": read_json(root / "scheduler" / "scheduler_config.json")}
    return found


def _with_scheduler(config: PixArtConfig, scheduler: Mapping[str, Any], folder: Path) -> PixArtConfig:
    """The config of a folder of others, where the scheduler alone says what the transformer predicts."""
    kind = predicts(scheduler)
    if kind not in PREDICTION_TYPES:
        raise CheckpointError(
            f"{folder} predicts {kind}, as its scheduler says; only {', '.join(PREDICTION_TYPES)} are offered"
        )
    return replace(config, prediction_type=kind, flow_shift=flow_shift_of(scheduler) if kind == "flow" else 1.0)


def _with_metadata(config: PixArtConfig | None, tensors: Mapping[str, Tensor]) -> PixArtConfig | None:
    """The config that our own files carry; beside a config.json it adds what diffusers has no field for."""
    text = getattr(tensors, "metadata", {}).get(CONFIG_IN_METADATA)
    if text is None:
        return config
    try:
        stored = PixArtConfig(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the config in the file's metadata cannot be used ({error}); convert it again"
        ) from error
    return stored if config is None else replace(config, model_max_length=stored.model_max_length)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises CheckpointError: unreadable, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not JSON of the expected kind; copy or download it again")
    return content
