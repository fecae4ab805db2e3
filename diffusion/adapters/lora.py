"""LoRA (arXiv:2106.09685) in a native network, through peft; files have the names of diffusers' transformer.

A fused projection (qkv, kv) has one adapter: its A is shared by the parts, its B is cut into them, exactly.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.checkpoints import diffusers_to_native, native_to_diffusers, save_tensors
from diffusion.checkpoints.tensors import read_tensors
from diffusion.errors import CheckpointError
from diffusion.models import PixArt

LORA_FOLDER = "transformer_lora"
LORA_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ADAPTER = "default"
_PEFT_PREFIX, _DIFFUSERS_PREFIX = "base_model.model.", "transformer."


def add_lora(network: PixArt, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None) -> PixArt:
    """Freeze a network and put trainable adapters of W + alpha / rank B A into its linear layers; B starts at zero.

    Args:
        alpha: None = rank, a factor of 1.
        targets: native names of the layers; None = every linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = targets or [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    network.requires_grad_(False)
    scale = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=list(chosen))  # type: ignore[arg-type]
    inject_adapter_in_model(config, network)
    return network


@contextlib.contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """Within this context the network computes what it did before it had adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    # The switch of peft also turns gradients off and on; this one leaves them alone.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The adapters of a network, under its own names (`blocks.0.attn.qkv.lora_A.default.weight`)."""
    return {key: tensor for key, tensor in network.state_dict().items() if ".lora_A." in key or ".lora_B." in key}


def load_lora_tensors(network: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Give adapters their values, strictly.

    Raises:
        CheckpointError: other layers or another rank than the network's adapters.
    """
    expected = lora_state_dict(network)
    other = sorted(expected.keys() ^ tensors.keys())
    other += [key for key in expected.keys() & tensors.keys() if expected[key].shape != tensors[key].shape]
    if other:
        raise CheckpointError(
            f"{source} does not fit the adapters: {len(other)} of {len(expected)} differ, the first {other[0]}; use "
            "the lora_rank that it was trained with"
        )
    network.load_state_dict(dict(tensors), strict=False)


def _scale(network: nn.Module) -> tuple[int, float]:
    """Rank and alpha of a network's adapters."""
    layer: Any = next(module for module in network.modules() if getattr(module, "lora_A", None))
    return layer.r[_ADAPTER], layer.lora_alpha[_ADAPTER]


def to_diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters under the names of diffusers' layers (`transformer_blocks.0.attn1.to_q.lora_A.weight`)."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, kind = key.split(".lora_")
        kind = kind.split(".")[0]  # A or B
        matrix = tensor.detach()
        if kind == "B":
            parts = native_to_diffusers({f"{module}.weight": matrix})
        else:  # shared by the parts of a fused layer, of which there are at most three
            parts = dict.fromkeys(native_to_diffusers({f"{module}.weight": torch.empty(6, 0)}), matrix)
        result |= {f"{name.removesuffix('.weight')}.lora_{kind}.weight": part for name, part in parts.items()}
    return result


def to_native_names(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Inverse of `to_diffusers_names`.

    Raises:
        CheckpointError: names of other layers, or a fused layer whose parts do not share their A.
    """
    result: dict[str, Tensor] = {}
    for kind in ("A", "B"):
        ending = f".lora_{kind}.weight"
        parts = {f"{key.removesuffix(ending)}.weight": t for key, t in tensors.items() if key.endswith(ending)}
        for key, tensor in diffusers_to_native(parts).items():
            if kind == "A" and (count := len(native_to_diffusers({key: tensor}))) > 1:
                first, *others = tensor.chunk(count)
                if not all(torch.equal(first, other) for other in others):
                    raise CheckpointError(f"{source}: the parts of {key} have adapters of their own; merge it instead")
                tensor = first
            result[f"{key.removesuffix('.weight')}.lora_{kind}.{_ADAPTER}.weight"] = tensor
    return result


def save_lora(network: PixArt, folder: str | Path, *, dtype: torch.dtype | None = None, base: str = "") -> None:
    """Write the adapters twice: for peft (adapter_config.json, adapter_model.safetensors) and for diffusers.

    `PeftModel.from_pretrained(transformer, folder)` opens the one; `transformer_lora/pytorch_lora_weights.safetensors`
    is the other, with rank and alpha in its header.

    Args:
        dtype: of the files; None = as in memory.
        base: name of the model below, for the config.
    Raises:
        StorageError: the disk is full.
    """
    folder = Path(folder)
    (folder / LORA_FOLDER).mkdir(parents=True, exist_ok=True)
    rank, alpha = _scale(network)
    native = lora_state_dict(network)
    tensors = {key: tensor.to("cpu", dtype).clone().contiguous() for key, tensor in to_diffusers_names(native).items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({key.split(".lora_")[0] for key in tensors}),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    save_tensors({f"{_PEFT_PREFIX}{key}": tensor for key, tensor in tensors.items()}, folder / PEFT_NAME)
    facts = {"rank": str(rank), "alpha": f"{alpha:g}"}
    named = {f"{_DIFFUSERS_PREFIX}{key}": tensor for key, tensor in tensors.items()}
    save_tensors(named, folder / LORA_FOLDER / LORA_NAME, facts)


def read_lora(folder: str | Path) -> dict[str, Tensor]:
    """Adapters that `save_lora` wrote, under native names; see `load_lora_tensors`.

    Raises:
        CheckpointError: not there, damaged, or of other layers.
    """
    path = Path(folder) / PEFT_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {PEFT_NAME}; give a checkpoint-N of a LoRA run")
    tensors = read_tensors(path)
    return to_native_names({key.removeprefix(_PEFT_PREFIX): tensors[key] for key in tensors}, path)


def merge_lora(network: PixArt) -> PixArt:
    """Fold the adapters into the weights (in place) and take them out: a plain network again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, module.get_base_layer())
    return network
