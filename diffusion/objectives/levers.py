"""What looks into the blocks of a network in training: token routing and alignment with a picture encoder.

Legend: B batch, N image tokens, K kept tokens, A width of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from diffusion.models.routing import TokenRoute, kept_tokens
from diffusion.process import keyed_uniform


@dataclass(frozen=True)
class Routing:
    """Token routing (TREAD, arXiv:2501.04765).

    Args:
        share: of the tokens, which passes around blocks first..last.
        until_number: sample number at which it ends; None = never.
    """

    share: float
    first: int
    last: int
    until_number: int | None = None


@dataclass(frozen=True)
class Alignment:
    """Alignment of the tokens after `block` blocks with an encoder's features (REPA, arXiv:2410.06940, Eq. 8).

    Args:
        weight: of 1 - cosine similarity in the loss.
        until_number: sample number at which it ends (HASTE, arXiv:2505.16792); None = never.
    """

    block: int
    weight: float
    until_number: int | None = None


def is_on(lever: Routing | Alignment | None, batch: Any) -> bool:
    """Whether a lever works on a batch: it is set, and has not ended."""
    return lever is not None and (lever.until_number is None or batch.first_number < lever.until_number)


class BlockWatch:
    """`before_block` of one forward pass: routes tokens, and compares those after a block with given features.

    Args:
        head: the network's `alignment_head`. It is called inside the network's forward pass, where sharded weights are
            whole. features: (B, N, A). Both None = no comparison.
    """

    def __init__(
        self, route: TokenRoute | None, block: int = 0, head: Any = None, features: Tensor | None = None
    ) -> None:
        self._route, self._block, self._head, self._features = route, block, head, features
        self.similarity: Tensor | None = None  # (B,) mean cosine over tokens

    def __call__(self, index: int, tokens: Tensor, *_: object) -> Tensor:
        if self._features is not None and index == self._block:
            features = self._features
            if self._route is not None and self._route.is_partial(index):
                kept = self._route.kept[:, :, None].expand(-1, -1, features.shape[-1])
                features = features.gather(1, kept)
            if tokens.shape[1] != features.shape[1]:
                raise ValueError(f"{tokens.shape[1]} tokens a picture, alignment features for {features.shape[1]}")
            self.similarity = F.cosine_similarity(self._head(tokens).float(), features.float(), dim=-1).mean(1)
        return tokens if self._route is None else self._route(index, tokens)


def watch_blocks(
    network: Any, batch: Any, seed: int, routing: Routing | None, alignment: Alignment | None
) -> BlockWatch | None:
    """The watch of one forward pass, or None when no lever works on the batch; routes are keyed by sample number."""
    routed, aligned = is_on(routing, batch), is_on(alignment, batch)
    if not (routed or aligned):
        return None
    route = None
    if routed:
        assert routing is not None
        height, width = batch.latents_mean.shape[-2:]
        count = height * width // network.config.patch_size**2
        scores = keyed_uniform(seed, "route", batch.sample_numbers, (count,))
        route = TokenRoute(kept_tokens(scores, routing.share), routing.first, routing.last)
    if not aligned:
        return BlockWatch(route)
    assert alignment is not None
    return BlockWatch(route, alignment.block, network.alignment_head, batch.alignment)


def silent(network: Any) -> Tensor:
    """Zero, through every weight of the alignment head: after its end, DDP still expects a gradient of each."""
    total: Tensor = sum(parameter.sum() for parameter in network.alignment_head.parameters()) * 0.0
    return total
