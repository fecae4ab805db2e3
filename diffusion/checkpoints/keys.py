"""Names of weights: the original's keys and diffusers' keys, mapped both ways as pure functions.

The two layouts hold the same tensors; fused projections (qkv, kv) are split or joined along their first dimension.
`pos_embed` is a function of the config and `y_embedder.y_embedding` has no place in diffusers; both stay native.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import CheckpointError
from diffusion.models import PixArtConfig

_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
NATIVE_ONLY = ("pos_embed", "y_embedder.y_embedding")
# Beginning of the names of weights that only training reads; they lie in a file of their own.
TRAINING_ONLY = "alignment_head."

# native prefix -> diffusers prefix; `{i}` is the block index.
_RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
    "blocks.{i}.attn.proj": "transformer_blocks.{i}.attn1.to_out.0",
    "blocks.{i}.attn.q_norm": "transformer_blocks.{i}.attn1.q_norm",
    "blocks.{i}.attn.k_norm": "transformer_blocks.{i}.attn1.k_norm",
    "blocks.{i}.cross_attn.q_linear": "transformer_blocks.{i}.attn2.to_q",
    "blocks.{i}.cross_attn.proj": "transformer_blocks.{i}.attn2.to_out.0",
    "blocks.{i}.mlp.fc1": "transformer_blocks.{i}.ff.net.0.proj",
    "blocks.{i}.mlp.fc2": "transformer_blocks.{i}.ff.net.2",
}
_TABLES = {
    "final_layer.scale_shift_table": "scale_shift_table",
    "blocks.{i}.scale_shift_table": "transformer_blocks.{i}.scale_shift_table",
}
_FUSED = {
    "blocks.{i}.attn.qkv": tuple(f"transformer_blocks.{{i}}.attn1.{name}" for name in ("to_q", "to_k", "to_v")),
    "blocks.{i}.cross_attn.kv_linear": tuple(f"transformer_blocks.{{i}}.attn2.{name}" for name in ("to_k", "to_v")),
}
_FORWARD = {f"{n}.{kind}": f"{d}.{kind}" for n, d in _RENAMED.items() for kind in ("weight", "bias")} | _TABLES
_SPLIT = {
    f"{n}.{kind}": tuple(f"{part}.{kind}" for part in parts)
    for n, parts in _FUSED.items()
    for kind in ("weight", "bias")
}
_BACKWARD = {diffusers: native for native, diffusers in _FORWARD.items()}
# Folders of diffusers 0.22-0.25, the published alpha ones among them, hold the null caption; later versions ignore it.
_BACKWARD["caption_projection.y_embedding"] = "y_embedder.y_embedding"
_JOIN = {parts[0]: (native, parts) for native, parts in _SPLIT.items()}
_JOINED = {part for parts in _SPLIT.values() for part in parts}


def _template(key: str) -> tuple[str, str]:
    """Replace the block index by `{i}`; returns the template and the index ("" outside blocks)."""
    match = re.match(r"^((?:transformer_)?blocks)\.(\d+)\.(.*)$", key)
    return (f"{match[1]}.{{i}}.{match[3]}", match[2]) if match else (key, "")


def module_names(depth: int) -> dict[str, str]:
    """Native name -> diffusers name of every layer with a weight, for `depth` blocks.

    Parts of a fused projection have names of their own, as `blocks.0.attn.qkv.to_q`.
    """
    names: dict[str, str] = {}
    for index in range(depth):
        for native, diffusers in _RENAMED.items():
            names.setdefault(native.replace("{i}", str(index)), diffusers.replace("{i}", str(index)))
        for native, parts in _FUSED.items():
            for part in parts:
                name = f"{native}.{part.rpartition('.')[2]}"
                names[name.replace("{i}", str(index))] = part.replace("{i}", str(index))
    return names


def native_to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the keys of diffusers' PixArtTransformer2DModel; those without a place in it are left out.

    These are the tensors of `NATIVE_ONLY`, and those whose names begin with `TRAINING_ONLY`.

    Raises:
        CheckpointError: keys that diffusers has no place for, all listed.
    """
    result: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state_dict.items():
        template, index = _template(key)
        if key in NATIVE_ONLY or key.startswith(TRAINING_ONLY):
            continue
        if template in _FORWARD:
            result[_FORWARD[template].replace("{i}", index)] = tensor
        elif template in _SPLIT:
            parts = _SPLIT[template]
            for part, piece in zip(parts, tensor.chunk(len(parts), dim=0)):
                result[part.replace("{i}", index)] = piece
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(f"diffusers has no place for these weights: {', '.join(unknown)}")
    return result


def diffusers_to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exact inverse of `native_to_diffusers`; the null caption of old folders comes along.

    Each weight is asked for once, so `state_dict` may read a file on demand.

    Raises:
        CheckpointError: unknown keys, or a part of a fused projection missing, all listed.
    """
    result: dict[str, Tensor] = {}
    problems = []
    for key in state_dict:
        template, index = _template(key)
        if template in _BACKWARD:
            result[_BACKWARD[template].replace("{i}", index)] = state_dict[key]
        elif template in _JOIN:
            native, parts = _JOIN[template]
            names = [part.replace("{i}", index) for part in parts]
            missing = [name for name in names if name not in state_dict]
            problems += [f"{name} (missing)" for name in missing]
            if not missing:
                result[native.replace("{i}", index)] = torch.cat([state_dict[name] for name in names])
        elif template not in _JOINED:
            problems.append(key)
    if problems:
        raise CheckpointError(f"these weights do not belong to a PixArt transformer: {', '.join(problems)}")
    return result


def config_to_diffusers(config: PixArtConfig) -> dict[str, Any]:
    """Fields of diffusers' `config.json` for a network.

    Raises:
        CheckpointError: options that diffusers' PixArt does not have.
    """
    lacking = [name for name in ("qk_norm", "kv_compress") if getattr(config, name)]
    if lacking:
        raise CheckpointError(f"diffusers' PixArtTransformer2DModel has no {' or '.join(lacking)}; save a .pth instead")
    # Fields of this project, for models that are sampled otherwise; diffusers ignores them.
    kind: dict[str, Any] = {}
    if config.prediction_type != "epsilon":
        kind["prediction_type"] = config.prediction_type
    kind |= {"flow_shift": config.flow_shift} if config.prediction_type == "flow" else {}
    return {
        **kind,
        "_class_name": _CLASSES[0],
        "sample_size": config.input_size,
        "num_layers": config.depth,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "attention_bias": True,
        "cross_attention_dim": config.hidden_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": config.caption_channels,
        "interpolation_scale": config.pe_interpolation,
        "use_additional_conditions": config.micro_condition,
    }


def predicts(config: Mapping[str, Any]) -> str:
    """What the network predicts that a scheduler of this config samples: "epsilon", "v_prediction" or "flow".

    The config is that of a file, which names the class.
    """
    kind = str(config.get("prediction_type", "epsilon"))
    is_flow = config.get("use_flow_sigmas") or "FlowMatch" in str(config.get("_class_name", ""))
    return "flow" if is_flow or kind == "flow_prediction" else kind


def flow_shift_of(config: Mapping[str, Any]) -> float:
    """Of a flow model's scheduler: solvers of the Gaussian process say flow_shift, those made for flow shift."""
    return float(config.get("flow_shift", config.get("shift", 1.0)))


def config_from_diffusers(config: Mapping[str, Any]) -> PixArtConfig:
    """The network that a diffusers `config.json` describes.

    The class is `Transformer2DModel` in diffusers 0.22-0.25, `PixArtTransformer2DModel` later; the fields are the same.

    Raises:
        CheckpointError: a key is missing, or another model is described.
    """
    described = config.get("_class_name", _CLASSES[0])
    if described not in _CLASSES or config.get("norm_type", "ada_norm_single") != "ada_norm_single":
        raise CheckpointError(
            f"transformer config.json describes {described} with norm_type={config.get('norm_type')!r}, not a PixArt "
            f"({' or '.join(_CLASSES)} with ada_norm_single)"
        )
    try:
        sample_size = config["sample_size"]
        scale = config.get("interpolation_scale")
        additional = config.get("use_additional_conditions")
        return PixArtConfig(
            input_size=sample_size,
            patch_size=config["patch_size"],
            in_channels=config["in_channels"],
            hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
            depth=config["num_layers"],
            num_heads=config["num_attention_heads"],
            pred_sigma=config["out_channels"] == 2 * config["in_channels"],
            caption_channels=config["caption_channels"],
            # The two defaults below are diffusers' own.
            pe_interpolation=max(sample_size // 64, 1) if scale is None else scale,
            micro_condition=sample_size == 128 if additional is None else additional,
            prediction_type=config.get("prediction_type", "epsilon"),
            flow_shift=config.get("flow_shift", 1.0),
        )
    except KeyError as error:
        raise CheckpointError(f"transformer config.json has no key {error}; is it a PixArt transformer?") from error
