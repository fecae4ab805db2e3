"""What PixArt and DiT share: patches and positions, recomputation, precision of attention, compilation.

Legend: B batch, C latent channels, h x w latent size, N image tokens, D width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion.models.attention import SelfAttention
from diffusion.models.checkpointing import recompute
from diffusion.models.embeddings import PatchEmbedder, sincos_position_embedding
from diffusion.models.kernels import Kernels
from diffusion.models.token_sharing import TokenSharing


class TransformerConfig(Protocol):
    """The fields that the shared part reads; see `PixArtConfig`."""

    @property
    def patch_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def base_size(self) -> int: ...
    @property
    def pe_interpolation(self) -> float: ...


@lru_cache(maxsize=128)
def _position_embedding(
    width: int, grid: tuple[int, int], base_size: int, scale: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # also where the model is built inside another device's
        table = sincos_position_embedding(width, grid, base_size, scale).to(dtype)
        if device.type == "cuda":  # the host does not wait where a bucket comes up for the first time
            return table.pin_memory().to(device, non_blocking=True)
        return table.to(device)


def compile_blocks(blocks: nn.ModuleList, *, dynamic: bool | None = None, **options: Any) -> None:
    """See `LatentTransformer.compile_blocks`."""
    if dynamic is False:  # beyond the limit torch runs uncompiled; a table of aspect ratios has about 40 shapes
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)  # type: ignore[attr-defined]
    for block in blocks:
        block.compile(dynamic=dynamic, **options)


class LatentTransformer(nn.Module):
    """A transformer over patches of latents, with `x_embedder` and `blocks`."""

    config: Any
    x_embedder: PatchEmbedder
    blocks: nn.ModuleList
    pos_embed: Tensor
    kernels = Kernels()  # see `kernels.use_kernels`
    checkpoint_every = 0
    checkpoint_selectively = False
    _sharing: TokenSharing | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    def position_embedding(self) -> Tensor:
        """The table of the training size, (1, base_size^2, D): the `pos_embed` buffer of official files."""
        return self._sincos((self.config.base_size, self.config.base_size)).clone()

    def enable_gradient_checkpointing(self, every: int = 1, *, selective: bool = False) -> None:
        """Recompute every `every`-th block in the backward pass instead of keeping its activations; 0 = off.

        Args:
            selective: keep the outputs of matrix products and attention, and recompute the rest.
        """
        self.checkpoint_every, self.checkpoint_selectively = every, selective

    def use_fp32_attention(self, enabled: bool = True) -> None:
        """Compute self-attention in float32 under mixed precision, as the original's training configs ask."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.fp32 = enabled

    def compile_blocks(self, *, dynamic: bool | None = None, **options: Any) -> None:
        """Let torch.compile fuse the work inside each block; all blocks share one compilation, state-dict keys stay.

        Needs a C++ compiler (CPU) or Triton (GPU). The first steps are slow.

        Args:
            dynamic: False = once for each shape of tokens and captions, which gives the fastest code; None = another
                shape is compiled once, for all further ones.
            options: others of torch.compile: mode, fullgraph, backend.
        """
        compile_blocks(self.blocks, dynamic=dynamic, **options)

    def share_tokens(self, sharing: TokenSharing | None) -> None:
        """From now on the latents given to this process are its strip of rows of the picture, (B, C, h / P, w), and so
        is what it returns; None = whole pictures again."""
        self._sharing = sharing
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.sharing = sharing

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Patches and positions: (B, C, h, w) -> (B, N, D)."""
        rows, cols = self._token_grid(latents)
        if self._sharing is None:
            positions = self._sincos((rows, cols))
        else:
            positions = self._sharing.strip(self._sincos((rows * self._sharing.size, cols)), dim=1)
        return self.x_embedder(latents.to(self.dtype)) + positions

    def _stream(self, tokens: Tensor) -> Tensor:
        """Tokens in the precision in which they run from block to block."""
        device = tokens.device.type
        if self.kernels.bf16_stream and torch.is_autocast_enabled(device):
            return tokens.to(torch.get_autocast_dtype(device))
        return tokens

    def _run_block(self, index: int, *arguments: Any) -> Tensor:
        """One block, recomputed in the backward pass if that is asked for."""
        block = self.blocks[index]
        if self.checkpoint_every and self.training and index % self.checkpoint_every == 0:
            return recompute(block, *arguments, selective=self.checkpoint_selectively)
        tokens: Tensor = block(*arguments)
        return tokens

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, p * p * C_out) -> (B, C_out, h, w)."""
        (rows, cols), p = grid, self.config.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=cols, p=p, q=p)

    def _token_grid(self, latents: Tensor) -> tuple[int, int]:
        height, width = latents.shape[-2:]
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {p}x{p}")
        return height // p, width // p

    def _sincos(self, grid: tuple[int, int]) -> Tensor:
        config = self.config
        device, dtype = self.device, self.dtype
        if device.type == "meta":
            return torch.empty(1, grid[0] * grid[1], config.hidden_size, device=device, dtype=dtype)
        return _position_embedding(config.hidden_size, grid, config.base_size, config.pe_interpolation, device, dtype)
