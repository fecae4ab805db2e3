"""ControlNet-Transformer of PixArt-delta (arXiv:2401.05252, Sec. 4): a condition picture steers a frozen PixArt.

Legend: B batch, C latent channels, h x w latent size, N image tokens, L text tokens, D width.
State-dict keys and shapes are the original's (`base_model.*`, `controlnet.*`), so published files load as they are.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.models.attention import PartlyKnown
from diffusion.models.initialization import zero_
from diffusion.models.kernels import TextLengths
from diffusion.models.latent_transformer import compile_blocks
from diffusion.models.pixart import PixArt, PixArtBlock, PixArtConfig, TextSignal, TimeSignal
from diffusion.models.token_sharing import TokenSharing


class ControlBlock(nn.Module):
    """A trainable copy of a base block; what it adds to the base model passes a layer that starts at zero."""

    def __init__(self, block: PixArtBlock, width: int, *, is_first: bool) -> None:
        super().__init__()
        self.copied_block = copy.deepcopy(block)
        self.before_proj = nn.Linear(width, width) if is_first else None
        self.after_proj = nn.Linear(width, width)
        for layer in (self.before_proj, self.after_proj):
            if layer is not None:
                zero_(layer)

    def forward(
        self,
        control: Tensor,
        tokens: Tensor,
        caption: Tensor | PartlyKnown,
        text: Tensor | TextLengths | None,
        modulation: Tensor,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """control, tokens (B, N, D) -> control of the next block, and what the base adds, both (B, N, D)."""
        if self.before_proj is not None:
            control = tokens + self.before_proj(control)
        control = self.copied_block(control, caption, text, modulation, grid)
        return control, self.after_proj(control)


class ControlPixArt(nn.Module):
    """A base PixArt and control blocks: the copy of base block j adds to the input of base block j + 1.

    With a fresh ControlNet, without a condition, or at strength 0 it computes exactly what the base does.

    Args:
        base: its weights are frozen; both kinds, for one size and for many, have the same ControlNet.
        num_blocks: control blocks, below the base's depth; 13 in the published files.
    Raises:
        ValueError: more control blocks than the base has places for.
    """

    def __init__(self, base: PixArt, num_blocks: int = 13) -> None:
        super().__init__()
        if not 0 < num_blocks < len(base.blocks):
            raise ValueError(
                f"num_blocks={num_blocks} must be between 1 and {len(base.blocks) - 1}, the base's depth - 1"
            )
        width = base.config.hidden_size
        self.base_model = base.requires_grad_(False)
        blocks = [cast(PixArtBlock, block) for block in base.blocks[:num_blocks]]
        self.controlnet = nn.ModuleList(
            ControlBlock(block, width, is_first=index == 0).requires_grad_() for index, block in enumerate(blocks)
        )

    @property
    def config(self) -> PixArtConfig:
        """Of the base model."""
        return self.base_model.config

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of the base model, then the control blocks."""
        return [*self.base_model.blocks, *self.controlnet]

    @property
    def y_embedder(self) -> nn.Module:
        """Of the base model: it holds the null caption."""
        return self.base_model.y_embedder

    def compile_blocks(self, *, dynamic: bool | None = None, **options: Any) -> None:
        """See `PixArt.compile_blocks`."""
        self.base_model.compile_blocks(dynamic=dynamic, **options)
        compile_blocks(self.controlnet, dynamic=dynamic, **options)

    def share_tokens(self, sharing: TokenSharing | None) -> None:
        """See `PixArt.share_tokens`; the condition is given as a strip as well."""
        self.base_model.share_tokens(sharing)
        for block in self.controlnet:
            cast(ControlBlock, block).copied_block.attn.sharing = sharing

    @property
    def dtype(self) -> torch.dtype:
        return self.base_model.dtype

    @property
    def device(self) -> torch.device:
        return self.base_model.device

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        caption_embeds: Tensor,
        caption_mask: Tensor | None = None,
        *,
        control_latents: Tensor | None = None,
        condition_strength: float = 1.0,
        img_hw: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Predict as `PixArt.forward` does, steered by a condition.

        Args:
            control_latents: (B, C, h, w) scaled VAE latents of the condition picture (edges); None = the base alone.
            condition_strength: factor of everything the control blocks add; 1 as trained.
        Returns:
            (B, out_channels, h, w).
        Raises:
            ValueError: control_latents of another shape than latents; see `PixArt.forward` for the rest.
        """
        time = self.embed_time(timesteps, img_hw=img_hw, aspect_ratio=aspect_ratio)
        text = self.embed_text(caption_embeds, caption_mask)
        return self.predict(latents, time, text, control_latents=control_latents, condition_strength=condition_strength)

    def embed_time(self, timesteps: Tensor, **sizes: Tensor | None) -> TimeSignal:
        """See `PixArt.embed_time`."""
        return self.base_model.embed_time(timesteps, **sizes)

    def with_tables(self, time: TimeSignal) -> TimeSignal:
        """See `PixArt.with_tables`."""
        return self.base_model.with_tables(time, self._copies)

    @property
    def _copies(self) -> list[PixArtBlock]:
        return [cast(ControlBlock, block).copied_block for block in self.controlnet]

    def embed_text(
        self, caption_embeds: Tensor, caption_mask: Tensor | None, *, project: bool = False, alone: int = 0
    ) -> TextSignal:
        """See `PixArt.embed_text`; what the control blocks take comes after what those of the base take."""
        return self.base_model.embed_text(
            caption_embeds, caption_mask, project=project, copies=self._copies, alone=alone
        )

    def predict(
        self,
        latents: Tensor,
        time: TimeSignal,
        text: TextSignal,
        *,
        control_latents: Tensor | None = None,
        condition_strength: float = 1.0,
    ) -> Tensor:
        """`forward` from embedded conditions, see `PixArt.predict`."""
        if control_latents is None:
            return self.base_model.predict(latents, time, text)
        if control_latents.shape != latents.shape:
            raise ValueError(
                f"control_latents {tuple(control_latents.shape)} must have the shape {tuple(latents.shape)}"
            )
        control = self.base_model.embed_latents(control_latents)  # (B, N, D), by the frozen patch embedding
        first_copy = len(self.base_model.blocks)

        def add_control(index: int, tokens: Tensor, *arguments: object) -> Tensor:
            nonlocal control
            if not 1 <= index <= len(self.controlnet):
                return tokens
            copy, grid = first_copy + index - 1, arguments[-1]
            inputs = (control, tokens, text.captions[copy], text.mask, time.of_block(copy), grid)
            if self.base_model.checkpoint_every and self.training:
                control, skip = checkpoint(self.controlnet[index - 1], *inputs, use_reentrant=False)
            else:
                control, skip = self.controlnet[index - 1](*inputs)
            return tokens + condition_strength * skip

        return self.base_model.predict(latents, time, text, before_block=add_control)
