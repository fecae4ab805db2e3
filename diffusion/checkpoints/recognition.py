"""What a set of weights is, from its keys and shapes: alpha or Sigma, image size, options, ControlNet.

What no key or shape tells is either a default of the published models, which is noted, or has to be given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusion.errors import CheckpointError
from diffusion.models import KVCompression, PixArtConfig, preset_heads
from diffusion.models.embeddings import sincos_position_embedding

FAMILIES = ("alpha", "sigma")
VAE_FACTOR = 8  # pixels a latent covers along each side, in every published model
_TOKENS = {"alpha": 120, "sigma": 300}
_SIZE_CONDITIONS = "csize_embedder.mlp.0.weight"
# Wrappers that other programs put before every key: DDP, torch.compile, and single files of whole pipelines.
_PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
# Without these nothing tells what a file should hold; whatever else is missing is listed by the comparison.
_CORE = ("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.mlp.fc1.weight")
_MAX_LISTED = 20  # keys of a file that is no PixArt
# Keys by which files of other kinds are told, so that the message names the kind instead of hundreds of keys.
_OTHER_KINDS = (
    (r"^controlnet\.0\.", "the branch of a ControlNet without its base; give it as --controlnet beside the base"),
    (r"lora_[AB]\.|\.lora_(down|up)\.", "LoRA weights, which change a model and are none"),
    (r"^block1\.convs\.0\.weight$", "the HED edge network, not a transformer"),
    (r"^encoder\.block\.0\.layer\.0\.", "a T5 text encoder, not a transformer"),
    (r"^decoder\.conv_in\.weight$", "a VAE, not a transformer"),
    (r"^(model\.diffusion_model\.)?input_blocks\.|^down_blocks\.0\.resnets", "a U-Net of another model"),
)


@dataclass(frozen=True)
class Found:
    """What a checkpoint turned out to be.

    Args:
        family: "alpha" or "sigma".
        layout: names in the file, "native" or "diffusers".
        num_keys, num_parameters: of the file as it stands; buffers (pos_embed, null caption) are keys, not parameters.
        control_blocks: of a ControlNet; 0 = a plain transformer.
        lcm: whether it is a latent consistency model, by its scheduler or name: no key or shape tells.
        dtypes: of the file's tensors.
        notes: what was assumed, dropped or remarkable, a sentence each.
    """

    family: str
    layout: str
    config: PixArtConfig
    num_keys: int
    num_parameters: int
    control_blocks: int = 0
    lcm: bool = False
    dtypes: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def image_size(self) -> int:
        """Pixels a side at the training size."""
        return self.config.input_size * VAE_FACTOR

    def describe(self) -> str:
        """One line for the person who gave the file."""
        config = self.config
        options = ["size conditions"] if config.micro_condition else []
        options += ["qk_norm"] if config.qk_norm else []
        if config.kv_compress is not None:
            layers = config.kv_compress.layers
            options.append(f"KV compression {config.kv_compress.scale_factor} in blocks {layers[0]}..{layers[-1]}")
        kind = f"PixArt-{self.family} {self.image_size} px"
        kind += " LCM" if self.lcm else ""
        kind += "" if config.prediction_type == "epsilon" else f", predicts {config.prediction_type}"
        if self.control_blocks:
            kind += f" with a ControlNet of {self.control_blocks} blocks"
        parts = [
            kind,
            ", ".join(options) or "no options",
            f"{config.depth} blocks of width {config.hidden_size}, {config.num_heads} heads",
            f"{config.model_max_length} caption tokens, position scale {config.pe_interpolation:g}",
            f"{self.num_keys} keys, {self.num_parameters:,} parameters, {'/'.join(self.dtypes)}",
            f"{self.layout} names",
            *self.notes,
        ]
        return "; ".join(parts)


def common_prefix(keys: Iterable[str]) -> str:
    """What a wrapper put before every transformer key of a file; "" for none."""
    keys = set(keys)
    prefix = ""
    while True:
        heads = ("x_embedder.proj.weight", "pos_embed.proj.weight", "base_model.x_embedder.proj.weight")
        if any(f"{prefix}{head}" in keys for head in heads):
            return prefix
        longer = [known for known in _PREFIXES if any(key.startswith(prefix + known) for key in keys)]
        if not longer:
            return ""
        prefix += longer[0]


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether keys are those of diffusers, not the original's."""
    return "pos_embed.proj.weight" in keys


def require_pixart(keys: Iterable[str], source: str) -> None:
    """Refuse files of other kinds by name, and others by what is missing. `keys` are native.

    Raises:
        CheckpointError: the file holds something else, or lacks the keys that every PixArt has.
    """
    keys = list(keys)
    missing = [key for key in _CORE if key not in keys]
    if not missing:
        return
    for pattern, kind in _OTHER_KINDS:
        if any(re.search(pattern, key) for key in keys):
            remedy = "" if ";" in kind else "; give the file of a PixArt transformer"
            raise CheckpointError(f"{source} holds {kind}{remedy}")
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    found = ", ".join(keys[:_MAX_LISTED]) + more
    raise CheckpointError(f"{source} is no PixArt transformer; missing: {', '.join(missing)}; found: {found}")


def recognise(
    state_dict: Mapping[str, Tensor],
    source: str,
    *,
    image_size: int | None = None,
    family: str | None = None,
    num_heads: int | None = None,
    pe_interpolation: float | None = None,
) -> tuple[str, PixArtConfig, list[str]]:
    """Family, config and notes of native weights; the arguments state what keys and shapes may leave open.

    Args:
        image_size: pixels a side at the training size. family: "alpha" or "sigma".
    Returns:
        family, config, and a sentence for everything that was assumed.
    Raises:
        CheckpointError: no PixArt, an argument contradicts the weights, or something is neither in them nor given.
    """
    if family is not None and family not in FAMILIES:
        raise CheckpointError(f"version={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    require_pixart(state_dict, source)
    notes: list[str] = []
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key)))
    heads = num_heads if num_heads is not None else preset_heads(width, depth)
    if heads is None:
        raise CheckpointError(f"{source}: no shape tells the heads of {depth} blocks of width {width}; give num_heads")
    family = _family(shapes, source, family, notes)
    tokens = shapes.get("y_embedder.y_embedding", (_TOKENS[family],))[0]
    input_size = _input_size(shapes, source, image_size, patch, notes)
    twice = 2 * channels * patch**2  # mean and variance
    try:
        config = PixArtConfig(
            input_size=input_size,
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
            pred_sigma=shapes.get("final_layer.linear.weight", (twice,))[0] == twice,
            caption_channels=shapes["y_embedder.y_proj.fc1.weight"][1],
            model_max_length=tokens,
            micro_condition=_SIZE_CONDITIONS in shapes,
            qk_norm="blocks.0.attn.q_norm.weight" in shapes,
            kv_compress=_kv_compression(shapes),
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    scale = pe_interpolation
    if scale is None:
        scale = _position_scale(state_dict.get("pos_embed"), config, _usual_scale(family, input_size), notes)
    return family, replace(config, pe_interpolation=scale), notes


def control_blocks(control: Mapping[str, Tensor], base: Mapping[str, Tensor], source: str) -> int:
    """Number of control blocks, whose keys and shapes follow from the base model (PixArt-delta, arXiv:2401.05252).

    Block j is a copy of base block j and a linear layer `after_proj`; block 0 has `before_proj` too.

    Raises:
        CheckpointError: every key that is missing, not expected or of another shape.
    """
    if not control:
        return 0
    width = base["x_embedder.proj.weight"].shape[0]
    count = 1 + max(int(match[1]) for key in control if (match := re.match(r"controlnet\.(\d+)\.", key)))
    expected: dict[str, tuple[int, ...]] = {}
    for index in range(count):
        block = f"blocks.{index}."
        copied = {key.removeprefix(block): tuple(tensor.shape) for key, tensor in base.items() if key.startswith(block)}
        expected |= {f"controlnet.{index}.copied_block.{key}": shape for key, shape in copied.items()}
        for name in ("before_proj", "after_proj") if index == 0 else ("after_proj",):
            expected |= {
                f"controlnet.{index}.{name}.weight": (width, width),
                f"controlnet.{index}.{name}.bias": (width,),
            }
    given = {key: tuple(tensor.shape) for key, tensor in control.items()}
    wrong = [f"{key} (missing)" for key in expected if key not in given]
    wrong += [f"{key} (unexpected)" for key in given if key not in expected]
    wrong += [
        f"{key} {given[key]}, not {expected[key]}" for key in given if given[key] != expected.get(key, given[key])
    ]
    if wrong:
        raise CheckpointError(f"{source} is no ControlNet of {count} blocks: {', '.join(wrong)}")
    return count


def family_of(config: PixArtConfig) -> str:
    """Sigma reads 300 tokens of T5, or has one of its options; everything else is alpha."""
    sigma = config.qk_norm or config.kv_compress is not None or config.model_max_length == _TOKENS["sigma"]
    return "sigma" if sigma else "alpha"


def default_tokens(family: str) -> int:
    """Caption tokens that a family was trained with."""
    return _TOKENS[family]


def tells_image_size(keys: Collection[str]) -> bool:
    """Whether weights tell the size of their pictures: by a position table, or as one with size conditions."""
    return "pos_embed" in keys or _SIZE_CONDITIONS in keys


def _family(shapes: Mapping[str, tuple[int, ...]], source: str, given: str | None, notes: list[str]) -> str:
    tokens = shapes.get("y_embedder.y_embedding", (0,))[0]
    options = [key for key in shapes if re.search(r"\.attn\.(q_norm|sr)\.weight$", key)]
    if options or tokens == _TOKENS["sigma"]:
        found = "sigma"
    elif tokens == _TOKENS["alpha"] or _SIZE_CONDITIONS in shapes:
        found = "alpha"
    else:
        family = "alpha" if given is None else given
        if given is None:
            notes.append("no key tells alpha from Sigma here, taken for alpha")
        return family
    # alpha and Sigma files of one kind have the same keys; only the token count differs, and training may change it.
    if given is not None and given != found and options:
        raise CheckpointError(f"{source} has {options[0]}, which only Sigma has; give version=sigma or leave it out")
    return found if given is None else given


def _input_size(
    shapes: Mapping[str, tuple[int, ...]], source: str, image_size: int | None, patch: int, notes: list[str]
) -> int:
    """Latent side at the training size: from the position table, or as given."""
    given = None if image_size is None else image_size // VAE_FACTOR
    if image_size is not None and (image_size < 1 or image_size % (VAE_FACTOR * patch)):
        raise CheckpointError(f"image_size={image_size} is no positive multiple of {VAE_FACTOR * patch} px")
    if "pos_embed" not in shapes:
        if given is not None:
            return given
        if _SIZE_CONDITIONS in shapes:
            notes.append("no pos_embed in the file, taken for 1024 px as every published model with size conditions")
            return 1024 // VAE_FACTOR
        raise CheckpointError(f"{source} does not tell its image size (no pos_embed); give image_size, e.g. 512")
    side = math.isqrt(shapes["pos_embed"][-2])
    if side * side != shapes["pos_embed"][-2]:
        raise CheckpointError(f"{source}: pos_embed of {shapes['pos_embed'][-2]} tokens is no square table")
    found = side * patch
    if given is not None and given != found:
        raise CheckpointError(
            f"{source} is a model for {found * VAE_FACTOR} px (its pos_embed has {side}x{side} tokens), not for "
            f"image_size={image_size}; give {found * VAE_FACTOR} or leave it out"
        )
    return found


def _kv_compression(shapes: Mapping[str, tuple[int, ...]]) -> KVCompression | None:
    """Compression by convolution has weights; the other samplings leave no trace in a file."""
    found = {
        int(match[1]): shape[-1]
        for key, shape in shapes.items()
        if (match := re.match(r"blocks\.(\d+)\.attn\.sr\.weight$", key))
    }
    return KVCompression("conv", next(iter(found.values())), tuple(sorted(found))) if found else None


def _usual_scale(family: str, input_size: int) -> float:
    """`lewei_scale` of the published alpha models, `pe_interpolation` of the Sigma ones: size / 512."""
    scale = input_size * VAE_FACTOR / 512
    return scale if family == "sigma" else max(scale, 1.0)


def _position_scale(table: Tensor | None, config: PixArtConfig, usual: float, notes: list[str]) -> float:
    """The scale that made the stored table; the usual one where there is none, or one of another making."""
    if table is None or table.is_meta:
        return usual
    rows = table.reshape(-1, config.hidden_size).float()
    grid = (config.base_size, config.base_size)

    def made_by(scale: float) -> bool:
        made = sincos_position_embedding(config.hidden_size, grid, config.base_size, scale)[0]
        return torch.allclose(rows, made, atol=5e-3)  # tables in half precision pass

    if made_by(usual):
        return usual
    quarter = config.hidden_size // 4
    step = math.atan2(rows[1, 0].item(), rows[1, quarter].item()) if len(rows) > 1 else 0.0  # radians a column
    guesses = (round(1 / step, 3), round(8 / step) / 8) if step > 0 else ()  # exact, and from a table in half precision
    for scale in guesses:
        if scale > 0 and made_by(scale):
            notes.append(f"its position table has scale {scale:g}; published models of this size have {usual:g}")
            return scale
    notes.append(f"its position table is not the usual one and was left out; scale {usual:g} is taken")
    return usual
