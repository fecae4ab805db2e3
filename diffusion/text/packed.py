"""T5's encoder with torch's fused norms, GELU and softmax: over captions laid end to end, or padded.

transformers pads the captions of a call to the longest one. Laid end to end, for extraction at scale, a row is a token,
whatever caption it is of, and no token of padding is multiplied by a weight; captions are padded inside attention
alone, which is 1 % of the arithmetic at 120 tokens. Padded, for drawing, shapes depend on no length, and nothing waits
for the device. Legend: T tokens of a call, B captions, L the longest, D width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.text.int8 import Int8Linear

_ROUND_LENGTH = 8  # SDPA's kernels copy a bias whose rows are no multiple of 16 bytes


@torch.no_grad()
def encode_packed(model: Any, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """What a `T5EncoderModel` in eval mode gives, beyond rounding: token ids of B captions -> (T, D), end to end.

    No caption may be empty; `</s>` counts.
    """
    encoder = model.encoder
    device = encoder.embed_tokens.weight.device
    flat = torch.tensor([token for ids in token_ids for token in ids])
    lengths = torch.tensor([len(ids) for ids in token_ids])
    rows, places, kept = (part.to(device) for part in _layout(lengths))
    return _encode(encoder, flat.to(device), kept, (rows, places))


@torch.no_grad()
def encode_padded(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What a `T5EncoderModel` in eval mode gives, beyond rounding: token ids (B, L) and mask (B, L) -> (B, L, D)."""
    return _encode(model.encoder, input_ids.flatten(), attention_mask.bool(), None).unflatten(0, input_ids.shape)


def _encode(encoder: Any, ids: Tensor, kept: Tensor, ways: tuple[Tensor, Tensor] | None) -> Tensor:
    """ids (T,) -> (T, D). kept, ways: see `_layout`; no ways where the tokens are padded already."""
    hidden = encoder.embed_tokens(ids)  # (T, D)
    first, longest = encoder.block[0].layer[0].SelfAttention, kept.shape[1]
    bias = first.compute_bias(longest, longest, device=ids.device)  # (1, H, L, L), shared by all blocks
    bias = bias.masked_fill(~kept[:, None, None, :], float("-inf")).to(hidden.dtype)  # (B, H, L, L)
    for block in encoder.block:
        attend, feed = block.layer[0], block.layer[1]
        hidden = hidden + _attention(attend.SelfAttention, _norm(attend.layer_norm, hidden), ways, bias)
        hidden = hidden + _feed_forward(feed.DenseReluDense, _norm(feed.layer_norm, hidden))
    return _norm(encoder.final_layer_norm, hidden)


def _layout(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ways between the end-to-end and the padded layout of captions of these lengths (B,).

    Returns:
        rows: (B * L,) the packed row that each padded place takes; padding takes the caption's first.
        places: (T,) the padded place of each packed row.
        kept: (B, L) bool, False = padding.
    """
    longest = -(-int(lengths.max()) // _ROUND_LENGTH) * _ROUND_LENGTH
    position = torch.arange(longest)
    kept = position < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    rows = starts[:, None] + torch.where(kept, position, 0)
    return rows.flatten(), kept.flatten().nonzero().squeeze(1), kept


def _attention(attention: Any, tokens: Tensor, ways: tuple[Tensor, Tensor] | None, bias: Tensor) -> Tensor:
    """tokens (T, D) -> (T, D); T5 does not scale its scores."""
    batch, heads, longest, _ = bias.shape

    def padded(part: Tensor) -> Tensor:
        return (part if ways is None else part[ways[0]]).view(batch, longest, heads, -1).transpose(1, 2)  # (B, H, L, K)

    q, k, v = (padded(linear(tokens)) for linear in (attention.q, attention.k, attention.v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
    merged = attended.transpose(1, 2).reshape(batch * longest, -1)
    result: Tensor = attention.o(merged if ways is None else merged[ways[1]])
    return result


def _feed_forward(feed: Any, tokens: Tensor) -> Tensor:
    """tokens (T, D) -> (T, D), in the dtype of the second layer (float32 in a float16 T5)."""
    from transformers.activations import NewGELUActivation

    if not (hasattr(feed, "wi_1") and isinstance(feed.act, NewGELUActivation)):
        result: Tensor = feed(tokens)
        return result
    inner = F.gelu(feed.wi_0(tokens), approximate="tanh").mul_(feed.wi_1(tokens))
    result = feed.wo(inner if isinstance(feed.wo, Int8Linear) else inner.to(feed.wo.weight.dtype))
    return result


def _norm(norm: Any, tokens: Tensor) -> Tensor:
    """T5's RMS norm, in the dtype of its weight: tokens are float32 where float16 would overflow."""
    weight = norm.weight
    if tokens.dtype == weight.dtype:
        return F.rms_norm(tokens, weight.shape, weight, norm.variance_epsilon)
    return F.rms_norm(tokens, weight.shape, eps=norm.variance_epsilon).to(weight.dtype) * weight
