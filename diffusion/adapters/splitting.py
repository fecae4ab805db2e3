"""Fused projections taken apart and put together: an adapter works on q, k and v, each with factors of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusion.adapters.lean import by_sum
from diffusion.models import PixArt

# The fused projections of a block, and what their parts are called in diffusers and in adapter files.
FUSED = {"attn.qkv": ("to_q", "to_k", "to_v"), "cross_attn.kv_linear": ("to_k", "to_v")}


class SplitProjection(nn.Module):
    """A linear layer as several that share its input; their outputs follow each other, as in the fused layer.

    The weights of the parts are views of the fused weight, so splitting takes no memory.
    """

    def __init__(self, fused: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        self.part_names = names
        weights, biases = fused.weight.detach().chunk(len(names)), fused.bias.detach().chunk(len(names))
        for name, weight, bias in zip(names, weights, biases):
            with torch.device("meta"):
                part = type(fused)(weight.shape[1], weight.shape[0])
            part.weight = nn.Parameter(weight, requires_grad=fused.weight.requires_grad)
            part.bias = nn.Parameter(bias, requires_grad=fused.bias.requires_grad)
            self.add_module(name, part)

    def parts(self) -> list[Any]:
        """The layers, or what an adapter has wrapped them in."""
        return [self.get_submodule(name) for name in self.part_names]

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out of all parts)."""
        summed = by_sum(self.parts(), inputs)
        return torch.cat([part(inputs) for part in self.parts()], dim=-1) if summed is None else summed

    def joined(self) -> nn.Linear:
        """The fused layer with the present weights."""
        parts = self.parts()
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = torch.cat([part.bias.detach() for part in parts])
        with torch.device("meta"):
            fused: nn.Linear = type(getattr(parts[0], "base_layer", parts[0]))(weight.shape[1], weight.shape[0])
        fused.weight, fused.bias = nn.Parameter(weight), nn.Parameter(bias)
        return fused.train(self.training)


def split_projections(network: PixArt) -> None:
    """Take the fused projections of all blocks apart, in place; the network computes the same."""
    for block in network.blocks:
        for path, names in FUSED.items():
            owner, _, attribute = path.rpartition(".")
            layer = block.get_submodule(path)
            if isinstance(layer, nn.Linear):
                setattr(block.get_submodule(owner), attribute, SplitProjection(layer, names))


def join_projections(network: PixArt) -> None:
    """Undo `split_projections` with the weights that the parts have now."""
    for block in network.blocks:
        for path in FUSED:
            owner, _, attribute = path.rpartition(".")
            layer = block.get_submodule(path)
            if isinstance(layer, SplitProjection):
                setattr(block.get_submodule(owner), attribute, layer.joined())
