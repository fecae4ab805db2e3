"""Adapter files: read in any of the usual layouts, written in three.

- peft: a folder with `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`.
- diffusers: `pytorch_lora_weights.safetensors`, keys `transformer.LAYER.lora_A.weight`; alpha in keys of its own.
- comfyui: one file with kohya's names for the factors (`lora_down`, `lora_up`, `alpha`, `dora_scale`) under
  `transformer.LAYER`, which ComfyUI maps to its PixArt.

Layers have diffusers' names in all of them. Every file says alpha, so the rank never decides the strength, and in its
header what the base predicts.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion.adapters.factors import Adapter, Factors
from diffusion.checkpoints import module_names, save_tensors
from diffusion.checkpoints.hub import hub_folder, parse_hub_id
from diffusion.checkpoints.weights import PREDICTION_IN_METADATA, SPEC_PREDICTIONS
from diffusion.errors import CheckpointError, ConfigError, did_you_mean

_LOG = logging.getLogger(__name__)
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
COMFYUI_WEIGHTS = "comfyui_lora.safetensors"
LAYOUTS = ("peft", "diffusers", "comfyui")
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_PREFIXES = ("base_model.model.", "unet.base_model.model.", "transformer.", "unet.", "diffusion_model.")
_FLAT_PREFIXES = ("lora_transformer_", "lora_unet_", "lycoris_")
_SUFFIXES = {
    "down": (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight"),
    "up": (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight"),
    "magnitude": (
        ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight",
        ".dora_scale",
    ),
    "alpha": (".alpha",),
}  # fmt: skip


def read_adapter(source: str | Path, weight_name: str | None = None) -> Adapter:
    """An adapter from a file, a folder or the hub, in any layout; nothing in it is executed.

    Args:
        source: safetensors file, folder (peft's or with one of the known files), run folder, or hub id.
        weight_name: of the file in the folder, when it has none of the usual names.
    Raises:
        CheckpointError: nothing there, damaged, keys that are no LoRA, or factors that do not belong together.
    """
    path = _locate(source, weight_name)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}); copy or download it again") from error
    facts = _facts(path, metadata)
    layers = _layers(tensors, facts, str(source))
    said = metadata.get(PREDICTION_IN_METADATA, "")
    kind = next((name for name, spec in SPEC_PREDICTIONS.items() if said in (name, spec)), "")
    return Adapter(str(source), layers, str(facts.get("base_model_name_or_path") or ""), kind)


def write_adapter(adapter: Adapter, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """All three layouts in one folder."""
    for layout in LAYOUTS:
        write_layout(adapter, folder, layout, dtype=dtype)


def write_layout(adapter: Adapter, folder: str | Path, layout: str, *, dtype: torch.dtype | None = None) -> Path:
    """One layout of an adapter under its usual name in a folder; returns the weight file.

    Raises:
        ConfigError: unknown layout. StorageError: the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name: _on_cpu(factors, dtype) for name, factors in adapter.layers.items()}
    kind = {PREDICTION_IN_METADATA: SPEC_PREDICTIONS[adapter.prediction_type]} if adapter.prediction_type else {}
    if layout == "peft":
        path = folder / PEFT_WEIGHTS
        save_tensors(_peft_tensors(layers), path, kind)
        (folder / PEFT_CONFIG).write_text(json.dumps(_peft_config(layers, adapter.base_model), indent=2) + "\n")
    elif layout == "diffusers":
        path = folder / DIFFUSERS_WEIGHTS
        config = {f"transformer.{key}": value for key, value in _peft_config(layers, adapter.base_model).items()}
        save_tensors(
            _diffusers_tensors(layers), path, {_DIFFUSERS_METADATA: json.dumps(config, sort_keys=True), **kind}
        )
    elif layout == "comfyui":
        path = folder / COMFYUI_WEIGHTS
        first = next(iter(layers.values()))
        metadata = {"ss_network_dim": str(first.rank), "ss_network_alpha": str(first.alpha), **kind}
        metadata |= {"ss_sd_model_name": adapter.base_model, "modelspec.architecture": "pixart/lora"}
        save_tensors(_kohya_tensors(layers), path, metadata)
    else:
        raise ConfigError(f"layout {layout!r} of an adapter is unknown; {did_you_mean(layout, LAYOUTS)}")
    return path


def _locate(source: str | Path, weight_name: str | None) -> Path:
    hub_id = parse_hub_id(source)
    if hub_id is not None:
        repo, inner = hub_id
        folder = hub_folder(repo, ("*.safetensors", PEFT_CONFIG), "safetensors files of an adapter")
        path = folder / inner if inner else folder
    else:
        path = Path(source)
    if path.is_file():
        return path
    usual = (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, f"transformer_lora/{DIFFUSERS_WEIGHTS}", COMFYUI_WEIGHTS)
    names = (weight_name,) if weight_name is not None else usual
    for name in names:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if weight_name is None and len(others) == 1:
        return others[0]
    lacking = f"has no {', '.join(names)}" if path.is_dir() else "does not exist"
    raise CheckpointError(f"LoRA {source} {lacking}; give its folder, its .safetensors file, or a model of the hub")


def _facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is said beside the tensors: peft's config, or the same in the header of a diffusers file."""
    try:
        if (path.parent / PEFT_CONFIG).is_file() and path.name == PEFT_WEIGHTS:
            facts = json.loads((path.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
        else:
            facts = json.loads(metadata.get(_DIFFUSERS_METADATA, "{}"))
            facts = {key.removeprefix("transformer."): value for key, value in facts.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent / PEFT_CONFIG} is not JSON ({error}); copy the adapter again") from error
    return dict(facts)


def _layers(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], source: str) -> dict[str, Factors]:
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = []
    flat = _flat_names(tensors)
    for key, tensor in tensors.items():
        kind, layer = _parse(key, flat)
        if kind is None:
            foreign.append(key)
        else:
            parts.setdefault(layer, {})[kind] = tensor
    if foreign or not parts:
        shown = ", ".join(foreign[:4]) or "no tensors at all"
        raise CheckpointError(f"{source} is no LoRA of a transformer: {shown}; give a file with LoRA factors")
    lacking = [f"{layer} without {kind}" for layer, own in parts.items() for kind in ("down", "up") if kind not in own]
    if lacking:
        raise CheckpointError(f"{source} is damaged: {', '.join(lacking[:4])} factor")
    if "lora_alpha" not in facts and any("alpha" not in own for own in parts.values()):
        _LOG.warning("LoRA %s says no alpha: it acts as with alpha = rank", source)
    return {layer: _factors(layer, own, facts, source) for layer, own in parts.items()}


def _factors(layer: str, own: Mapping[str, Tensor], facts: Mapping[str, Any], source: str) -> Factors:
    down, up = own["down"], own["up"]
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise CheckpointError(f"{source}: {layer} has factors of ranks {rank} and {up.shape[1]}; it is damaged")
    if "alpha" in own:
        alpha = float(own["alpha"])
    else:
        alpha = float(_for_layer(facts.get("alpha_pattern"), layer, facts.get("lora_alpha", rank)))
        alpha *= rank**0.5 if facts.get("use_rslora") else 1
    magnitude = own.get("magnitude")
    return Factors(down, up, alpha, None if magnitude is None else magnitude.reshape(-1))


def _for_layer(pattern: Mapping[str, Any] | None, layer: str, usual: Any) -> Any:
    """The entry of peft's rank_pattern or alpha_pattern for a layer."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return usual


def _parse(key: str, flat: Mapping[str, str]) -> tuple[str | None, str]:
    """("down", layer) and so on; (None, key) for what is no factor."""
    for kind, suffixes in _SUFFIXES.items():
        for suffix in suffixes:
            if not key.endswith(suffix):
                continue
            name = key.removesuffix(suffix)
            for prefix in _FLAT_PREFIXES:
                if name.startswith(prefix):
                    return (kind, flat[short]) if (short := name.removeprefix(prefix)) in flat else (None, key)
            return kind, name.removeprefix(next((p for p in _PREFIXES if name.startswith(p)), ""))
    return None, key


def _flat_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names with dots by the same names with underscores, for layouts that flatten them."""
    numbers = [int(found[1]) for key in tensors if (found := re.search(r"transformer_blocks_(\d+)_", key))]
    return {name.replace(".", "_"): name for name in module_names(max(numbers, default=-1) + 1).values()}


def _on_cpu(factors: Factors, dtype: torch.dtype | None) -> Factors:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype).contiguous().clone()

    magnitude = None if factors.magnitude is None else moved(factors.magnitude)
    return Factors(moved(factors.down), moved(factors.up), factors.alpha, magnitude)


def _peft_tensors(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, factors in layers.items():
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": factors.down, f"{key}.lora_B.weight": factors.up}
        if factors.magnitude is not None:
            shape = (-1,) if factors.down.ndim == 2 else (1, -1, 1, 1)
            tensors[f"{key}.lora_magnitude_vector"] = factors.magnitude.view(shape)
    return tensors


def _diffusers_tensors(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    renamed = {
        key.replace("base_model.model.", "transformer.", 1): value for key, value in _peft_tensors(layers).items()
    }
    return renamed | {f"transformer.{name}.alpha": torch.tensor(factors.alpha) for name, factors in layers.items()}


def _kohya_tensors(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, factors in layers.items():
        key = f"transformer.{name}"
        tensors |= {f"{key}.lora_down.weight": factors.down, f"{key}.lora_up.weight": factors.up}
        tensors[f"{key}.alpha"] = torch.tensor(factors.alpha)
        if factors.magnitude is not None:
            tensors[f"{key}.dora_scale"] = factors.magnitude.view(-1, *[1] * (factors.down.ndim - 1))
    return tensors


def _peft_config(layers: Mapping[str, Factors], base_model: str) -> dict[str, Any]:
    """What peft needs; layers are listed by their whole names, so that none is adapted by accident."""
    ranks, alphas = [{name: value(f) for name, f in layers.items()} for value in (_rank_of, _alpha_of)]
    rank, alpha = max(ranks.values()), max(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(factors.magnitude is not None for factors in layers.values()),
        "target_modules": sorted(layers),
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
    }


def _rank_of(factors: Factors) -> int:
    return factors.rank


def _alpha_of(factors: Factors) -> float | int:
    return int(factors.alpha) if float(factors.alpha).is_integer() else factors.alpha
