"""Self- and cross-attention over torch's SDPA. Legend: B batch, N image tokens, L text tokens, D width, H heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.models.kernels import (
    Kernels,
    TextLengths,
    attend,
    attend_text,
    from_heads,
    text_width,
    to_heads,
    to_qkv,
)
from diffusion.models.token_sharing import TokenSharing

SAMPLINGS = ("conv", "ave", "uniform")


@dataclass(frozen=True)
class KVCompression:
    """Key/value token compression of PixArt-Sigma (Sec. 3.2).

    Args:
        sampling: "conv" (depthwise, learned), "ave" (nearest pixel; the original's name for it) or "uniform" (stride).
        scale_factor: r, compression a side; 1 leaves the tokens alone.
        layers: indices of the blocks that compress.
    """

    sampling: str = "conv"
    scale_factor: int = 1
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists alone
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"kv_compress sampling={self.sampling!r} is unknown; choose one of {', '.join(SAMPLINGS)}")
        if self.scale_factor < 1:
            raise ValueError(f"kv_compress scale_factor={self.scale_factor} must be at least 1")


class SelfAttention(nn.Module):
    """Multi-head attention with a fused qkv projection.

    Options of PixArt-Sigma: LayerNorm on q and k over the full width, before the head split; compression of the
    key/value grid by r a side, after the norm.
    """

    kernels = Kernels()

    def __init__(
        self, width: int, num_heads: int, *, qk_norm: bool = False, sampling: str = "conv", sr_ratio: int = 1
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.sampling, self.sr_ratio = sampling, sr_ratio
        self.fp32 = False  # see PixArt.use_fp32_attention
        self.sharing: TokenSharing | None = None  # see PixArt.share_tokens
        if sr_ratio > 1 and sampling == "conv":
            self.sr = nn.Conv2d(width, width, kernel_size=sr_ratio, stride=sr_ratio, groups=width)
            self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, N, D) of a grid of rows x cols tokens -> (B, N, D)."""
        kernels, channels = self.kernels, tokens.shape[-1] // self.num_heads
        if self.sr_ratio == 1 and isinstance(self.q_norm, nn.Identity) and not self.fp32:
            q, k, v = to_qkv(self.qkv, tokens, channels, kernels.head_width, fused=kernels.fused)  # (B, N, H, c)
            return from_heads(self.proj, self._attend(q, k, v, channels), channels)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)  # each (B, N, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.sr_ratio > 1:
            k, v = self._compress(k, grid), self._compress(v, grid)  # (B, N / r^2, D)
        dtype = torch.float32 if self.fp32 else v.dtype
        q, k, v = (rearrange(part, "b n (h c) -> b n h c", h=self.num_heads).to(dtype) for part in (q, k, v))
        attended = self._attend(q, k, v)
        return self.proj(attended.flatten(2).to(tokens.dtype if self.fp32 else dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, channels: int | None = None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # q, k, v have the precision that was asked for
            if self.sharing is not None:
                k, v = self.sharing.whole(k, v)
            return attend(q, k, v, self.kernels, channels=channels)

    def _compress(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, cols = grid
        r = self.sr_ratio
        image = rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=cols)
        if self.sampling == "conv":
            return self.norm(rearrange(self.sr(image), "b d h w -> b (h w) d"))
        if self.sampling == "ave":
            image = F.interpolate(image, scale_factor=1 / r, mode="nearest")
        else:
            image = image[:, :, ::r, ::r]
        return rearrange(image, "b d h w -> b (h w) d")


class PartlyKnown(NamedTuple):
    """Captions of which the first B0 have one token, so that what attention gives for them depends on no image token.

    Args:
        known: (B0, 1, D), of `CrossAttention.of_one_token`. pair: `CrossAttention.keys_values` of the others.
    """

    known: Tensor
    pair: Tensor


class CrossAttention(nn.Module):
    """Image tokens attend to caption tokens; padding is never attended."""

    kernels = Kernels()

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, caption: Tensor | PartlyKnown, text: Tensor | TextLengths | None) -> Tensor:
        """Image tokens (B, N, D) and captions to (B, N, D).

        Args:
            caption: (B, L, D), or (T, D) of packed captions; or `keys_values` of it; or captions partly known.
            text: (B, 1, 1, L) bool, True = keep; None = every token; or the lengths of packed captions. Not of those
                that are known.
        """
        if isinstance(caption, PartlyKnown):
            known = caption.known.expand(-1, tokens.shape[1], -1)
            return torch.cat([known, self(tokens[len(known) :], caption.pair, text)])
        kernels, channels = self.kernels, tokens.shape[-1] // self.num_heads
        width, spare = text_width(kernels, channels, text)
        q = to_heads(self.q_linear, tokens, channels, width, spare)
        pair = caption if caption.ndim > 3 else self.keys_values(caption)
        return from_heads(self.proj, attend_text(q, pair, text, kernels), channels)

    def keys_values(self, caption: Tensor) -> Tensor:
        """(B, L, D) -> (2, B, L, H, D / H), packed (T, D) -> (2, T, H, D / H).

        No timestep enters, so a solver needs them once a picture.
        """
        return self.kv_linear(caption).unflatten(-1, (2, self.num_heads, -1)).movedim(-3, 0)

    def of_one_token(self, caption: Tensor) -> Tensor:
        """(B, 1, D) -> (B, 1, D): what every image token gets from captions of one token, all of whose weight is 1."""
        values: Tensor = self.kv_linear(caption).chunk(2, dim=-1)[1]
        attended: Tensor = self.proj(values)
        return attended


def expand_caption_mask(caption_mask: Tensor | None) -> Tensor | None:
    """(B, L) bool, True = keep, to the (B, 1, 1, L) that SDPA broadcasts over heads and queries."""
    return None if caption_mask is None else caption_mask.to(torch.bool)[:, None, None, :]
