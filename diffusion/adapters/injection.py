"""Adapters in a network, through peft: put in, read out, scaled, merged into the weights, taken out.

peft wraps layers in place, so the network stays a `PixArt`: the trainer and the pipeline do not see a difference.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.adapters.factors import Adapter, Factors, require_base
from diffusion.adapters.lean import make_lean, stop_sums, sum_ahead
from diffusion.adapters.splitting import join_projections, split_projections
from diffusion.checkpoints import module_names
from diffusion.errors import CheckpointError, ConfigError
from diffusion.models import PixArt
from diffusion.text import Int8Linear

DEFAULT = "default"


def start_lora(
    network: PixArt, rank: int, *, alpha: float | None = None, use_dora: bool = False, use_rslora: bool = False
) -> None:
    """Freeze a network and add new factors to all its layers, in place; the output does not change yet.

    The layers are those that the original adapts: every projection of attention and feed-forward, the embedders of
    patches, captions, timestep and sizes, adaLN and the last layer. `down` is drawn from torch's global generator
    (Gaussian), `up` is zero. The factors are float32 whatever the network is.

    Args:
        alpha: None = 8, peft's default, which the original leaves.
        use_dora, use_rslora: see `diffusion.adapters.factors`.
    Raises:
        ConfigError: rank below 1 or above the width.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not 1 <= rank <= network.config.hidden_size:
        raise ConfigError(f"rank={rank} must be between 1 and the model's width {network.config.hidden_size}")
    network.requires_grad_(False)
    split_projections(network)
    targets = [name for name in module_names(network.config.depth) if _has_weight(network, name)]
    config = LoraConfig(
        r=rank,
        lora_alpha=8 if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=targets,
        init_lora_weights="gaussian",
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    inject_adapter_in_model(config, network, adapter_name=DEFAULT)
    make_lean(network)
    sum_ahead(network)
    for parameter in adapter_parameters(network).values():
        parameter.data = parameter.data.float()


def add_adapter(network: PixArt, adapter: Adapter, name: str) -> None:
    """Put an adapter into a network, beside others that it may hold, in the network's precision.

    Raises:
        CheckpointError: it does not fit (see `require_base`), or the name is taken.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if name in adapter_names(network):
        raise CheckpointError(f"adapter {name!r} is loaded already; give another adapter_name, or unload it first")
    if adapter.is_dora and any(factors.magnitude is None for factors in adapter.layers.values()):
        raise CheckpointError(f"{adapter.source} has DoRA magnitudes for some of its layers only; it is damaged")
    require_base(adapter, network)
    split_projections(network)
    native = {diffusers: own for own, diffusers in module_names(network.config.depth).items()}
    layers = {native[layer]: factors for layer, factors in adapter.layers.items()}
    config = LoraConfig(
        r=max(factors.rank for factors in layers.values()),
        target_modules=list(layers),
        rank_pattern={f"^{layer}$": factors.rank for layer, factors in layers.items()},
        alpha_pattern={f"^{layer}$": factors.alpha for layer, factors in layers.items()},  # type: ignore[misc]
        use_dora=adapter.is_dora,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, network, adapter_name=name)
    make_lean(network)
    write_factors(network, adapter, name)
    network.requires_grad_(False)


@torch.no_grad()
def write_factors(
    network: PixArt, adapter: Adapter, name: str = DEFAULT, *, values: Mapping[str, Tensor] | None = None
) -> None:
    """Overwrite the factors that a network holds under `name`; the layers must be the same.

    Args:
        values: tensors to overwrite instead of the network's own, by the names of its parameters.
    Raises:
        CheckpointError: other layers or ranks than the network's adapter has.
    """
    held = read_adapter_from(network, name, values=values)
    ranks = {layer: factors.rank for layer, factors in held.layers.items()}
    given = {layer: factors.rank for layer, factors in adapter.layers.items()}
    if ranks != given:
        kinds = [f"{len(r)} layers of rank {', '.join(map(str, sorted(set(r.values()))))}" for r in (given, ranks)]
        raise CheckpointError(f"{adapter.source} has {kinds[0]}, this run {kinds[1]}; use the same rank")
    for layer, factors in adapter.layers.items():
        own = held.layers[layer]
        own.down.copy_(factors.down)
        own.up.copy_(factors.up)
        if own.magnitude is not None and factors.magnitude is not None:
            own.magnitude.copy_(factors.magnitude)


def read_adapter_from(network: PixArt, name: str = DEFAULT, *, values: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter that a network holds under a name.

    Args:
        values: tensors to take instead of the network's own, by the names of its parameters.
    """
    layers: dict[str, Factors] = {}
    for native, diffusers in module_names(network.config.depth).items():
        layer = _tuner(network, native)
        if layer is None or name not in layer.lora_A:
            continue
        parts = {kind: getattr(layer, kind) for kind in ("lora_A", "lora_B", "lora_magnitude_vector")}
        given = {
            kind: held[name].weight if values is None else values[f"{native}.{kind}.{name}.weight"]
            for kind, held in parts.items()
            if name in held
        }
        magnitude = given.get("lora_magnitude_vector")
        rank = layer.r[name]
        alpha = layer.lora_alpha[name] * (rank**0.5 if layer.use_rslora.get(name) else 1)
        layers[diffusers] = Factors(
            given["lora_A"], given["lora_B"], float(alpha),
            None if magnitude is None else magnitude.view(-1),
        )  # fmt: skip
    return Adapter(name, layers, prediction_type=network.config.prediction_type)


@contextlib.contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Within this context the network computes what it did before it had adapters; gradients stay as they are."""
    layers = [module for module in network.modules() if _is_tuner(module)]
    for layer in layers:  # peft's own switch turns gradients off and on as well
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]


def adapter_names(network: PixArt) -> list[str]:
    """Adapters that a network holds, in the order in which they came."""
    return list(getattr(network, "peft_config", {}))


def adapter_parameters(network: PixArt) -> dict[str, nn.Parameter]:
    """The factors of all adapters by their name in the network."""
    return {name: parameter for name, parameter in network.named_parameters() if ".lora_" in name}


def set_scales(network: PixArt, scales: Mapping[str, float]) -> None:
    """Let these adapters act, each times a factor (1 = as trained, 0 = not at all), and no others."""
    for layer in _tuners(network):
        layer.set_adapter([name for name, scale in scales.items() if name in layer.lora_A and scale != 0])
        for name, scale in scales.items():
            layer.set_scale(name, scale)
    network.requires_grad_(False)


def merge(network: PixArt, names: Sequence[str]) -> None:
    """Add adapters, at their scales, to the weights.

    Raises:
        CheckpointError: a sum is not finite; nothing is merged then.
    """
    for layer in _tuners(network):
        try:
            layer.merge(safe_merge=True, adapter_names=[name for name in names if name in layer.lora_A])
        except ValueError as error:
            unmerge(network)
            raise CheckpointError(f"adapters {', '.join(names)} cannot be merged: {error}") from error


def unmerge(network: PixArt) -> None:
    """Take merged adapters out of the weights again."""
    for layer in _tuners(network):
        if layer.merged:
            layer.unmerge()


def is_merged(network: PixArt) -> bool:
    return any(layer.merged for layer in _tuners(network))


def remove_adapters(network: PixArt) -> None:
    """Make a network plain again; what was merged stays in its weights."""
    for name, module in list(network.named_modules()):
        if _is_tuner(module):
            wrapper: Any = module
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, wrapper.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
    stop_sums(network)
    join_projections(network)


def base_weights(network: PixArt) -> dict[str, Tensor]:
    """The weights under adapters, by diffusers name of their layer."""
    found: dict[str, Tensor] = {}
    for native, diffusers in module_names(network.config.depth).items():
        layer = _tuner(network, native)
        if layer is not None:
            base = layer.get_base_layer()
            weight = base.weight
            found[diffusers] = weight * base.scale if isinstance(base, Int8Linear) else weight
    return found


def quantize_base(network: PixArt) -> int:
    """Keep the linear layers under adapters in int8; returns how many."""
    linears = [layer for layer in _tuners(network) if isinstance(layer.get_base_layer(), nn.Linear)]
    for layer in linears:
        layer.base_layer = Int8Linear(layer.get_base_layer())
    return len(linears)


def _has_weight(network: PixArt, name: str) -> bool:
    try:
        return isinstance(network.get_submodule(name), (nn.Linear, nn.Conv2d))
    except AttributeError:
        return False


def _is_tuner(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _tuner(network: PixArt, native: str) -> Any:
    """The wrapper of a layer, or None where it has none or does not exist."""
    try:
        module = network.get_submodule(native)
    except AttributeError:
        return None
    return module if _is_tuner(module) else None


def _tuners(network: PixArt) -> list[Any]:
    return [module for module in network.modules() if _is_tuner(module)]
