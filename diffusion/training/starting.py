"""The network of a run, new or from the weights of another one: which weights may be missing, and how they begin.

A stage starts from the checkpoint of the stage before. Every weight has to fit, except what is named here: position
tables follow from the config; conditions and heads that the stage adds begin silent or as drawn; and a DiT becomes a
PixArt by `start_from_dit`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.checkpoints import Weights, build_dit, load_weights, materialize_buffers, read_weights
from diffusion.errors import CheckpointError
from diffusion.models import (
    DiT,
    LatentTransformer,
    PixArt,
    build_model,
    is_class_conditional,
    silence_sizes,
    start_from_dit,
)
from diffusion.models.alignment import AlignmentHead
from diffusion.training.run_log import LOGGER

# Parts that a stage may add to the network of the stage before.
_ADDED = ("csize_embedder", "ar_embedder", "alignment_head")


def new_network(name: str, options: dict[str, Any], head: tuple[int, int] | None = None) -> Any:
    """A network by its config name, with initial weights.

    Args:
        options: fields of its config. head: hidden width and channels of an alignment head; None = without.
    Raises:
        ConfigError: unknown name or option, or sizes that do not divide.
    """
    network = build_model(name, **options)
    if head is not None:
        network.alignment_head = AlignmentHead(network.config.hidden_size, *head)
    return network


def started_network(
    name: str, options: dict[str, Any], source: str | Path, head: tuple[int, int] | None = None
) -> LatentTransformer:
    """The same with the weights of a checkpoint of any kind, which are held once.

    Raises:
        CheckpointError: nothing to read, every weight that does not fit, or a model that predicts something else.
    """
    weights = read_weights(source)
    if weights.control:
        raise CheckpointError(f"{source} is a ControlNet; training starts from a transformer")
    if weights.layout == "dit" and not is_class_conditional(name):
        return _pixart_from_dit(new_network(name, options, head), weights)
    with torch.device("meta"):
        network: LatentTransformer = new_network(name, options, head)
    if isinstance(network, DiT) and weights.layout != "dit":
        raise CheckpointError(f"{source} is a PixArt; a class-conditional {name} starts from a DiT")
    stated = weights.config or weights.dit
    # Files without a config are those of others, which predict noise.
    require_same_prediction(network, stated.prediction_type if stated else "epsilon", weights.source)
    state_dict = {**weights.state_dict, **_begin_added_parts(network, weights)}
    load_weights(network, state_dict, source, assign=True)
    lacks_null_caption = isinstance(network, PixArt) and network.y_embedder.y_embedding.is_meta
    materialize_buffers(network)
    if lacks_null_caption:
        network.y_embedder.reset_null_caption()  # type: ignore[union-attr, operator]
    return network.float()


def _pixart_from_dit(network: PixArt, weights: Weights) -> PixArt:
    dit = build_dit(weights, num_heads=network.config.num_heads)
    try:
        start_from_dit(network, dit)
    except ValueError as error:
        raise CheckpointError(f"{weights.source} is a DiT that cannot start this run: {error}") from error
    LOGGER.info("%s is a class-conditional DiT; its adaLN became adaLN-single at t = 500", weights.source)
    return network


def require_same_prediction(network: LatentTransformer, given: str, source: object) -> None:
    """Refuse weights that predict something else than the network shall.

    Raises:
        CheckpointError: they do.
    """
    wanted = getattr(network.config, "prediction_type", "epsilon")
    if given != wanted:
        raise CheckpointError(
            f"{source} predicts {given}, this run {wanted}; set process.prediction_type={given!r}, or start "
            "from another checkpoint"
        )


def _begin_added_parts(network: LatentTransformer, weights: Weights) -> dict[str, torch.Tensor]:
    """Initial weights of the parts that the checkpoint lacks as a whole; sizes begin silent, so they change nothing."""
    names = {key.split(".")[0] for key in weights.state_dict}
    added = [part for part in _ADDED if hasattr(network, part) and part not in names]
    for part in added:
        module = getattr(network, part).to_empty(device="cpu")
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
                if part != "alignment_head":
                    nn.init.normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)
    if "csize_embedder" in added and "ar_embedder" in added:
        silence_sizes(network)  # type: ignore[arg-type]
    if added:
        LOGGER.info("%s has no %s: they begin anew", weights.source, ", ".join(added))
    return {f"{part}.{key}": tensor for part in added for key, tensor in getattr(network, part).state_dict().items()}
