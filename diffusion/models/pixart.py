"""PixArt: a Diffusion Transformer conditioned on T5 captions (PixArt-alpha, arXiv:2310.00426; Sigma, arXiv:2403.04692).

Legend: B batch, C latent channels, h x w latent size, N image tokens, L text tokens, D width.
State-dict keys and shapes are the original's, so official weight files load without renaming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.models.attention import (
    CrossAttention,
    KVCompression,
    PartlyKnown,
    SelfAttention,
    expand_caption_mask,
)
from diffusion.models.embeddings import (
    ApproxGelu,
    CaptionEmbedder,
    PatchEmbedder,
    ScalarEmbedder,
    SizeEmbedder,
)
from diffusion.models.initialization import initialize_weights
from diffusion.models.kernels import (
    Kernels,
    TextLengths,
    gated_residual,
    gelu_mlp,
    kept_norm,
    modulated_norm,
    pack,
    residual_norm,
)
from diffusion.models.latent_transformer import LatentTransformer
from diffusion.models.mlp import DropPath, Mlp

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class PixArtConfig:
    """Everything that rebuilds a network.

    Args:
        input_size: latent side at the training size (pixels / 8).
        patch_size: latent pixels a token side.
        in_channels: latent channels.
        hidden_size: D; divisible by num_heads, and by 4 for the position embedding.
        depth, num_heads, mlp_ratio: shape of the blocks.
        pred_sigma: predict the variance too; the output then has twice the latent channels.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0.
        caption_channels: width of the text encoder's states.
        pe_interpolation: stretch of the position coordinates (alpha: lewei_scale).
        model_max_length: tokens of the stored null caption.
        micro_condition: embed picture size and aspect ratio (alpha 1024; needs D divisible by 3).
        qk_norm, kv_compress: options of PixArt-Sigma.
        prediction_type: what the first C output channels are: "epsilon" (noise, all published PixArt models),
            "v_prediction" (arXiv:2202.00512) or "flow" (noise - latents, rectified flow, arXiv:2403.03206).
        flow_shift: of a flow model, how far its noise levels are moved towards noise (same paper, Eq. 23).
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    pe_interpolation: float = 1.0
    model_max_length: int = 120
    micro_condition: bool = False
    qk_norm: bool = False
    kv_compress: KVCompression | None = None
    prediction_type: str = "epsilon"
    flow_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={self.prediction_type!r} must be one of {', '.join(PREDICTION_TYPES)}")
        if isinstance(self.kv_compress, Mapping):
            object.__setattr__(self, "kv_compress", KVCompression(**self.kv_compress))
        if self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads} must be at least 1")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads} and by 4")
        if self.micro_condition and self.hidden_size % 3:
            raise ValueError(f"hidden_size={self.hidden_size} must be divisible by 3 for micro_condition=True")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size={self.input_size} must be divisible by patch_size={self.patch_size}")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def base_size(self) -> int:
        """Tokens a side at the training size."""
        return self.input_size // self.patch_size


class TimeSignal(NamedTuple):
    """Timestep and sizes as the blocks take them.

    conditioning (B, D); modulation (B, 6 * D): adaLN-single, of all blocks. tables: (B, blocks, 6, D), the modulation
    with the table of each block added to it; None = the blocks add theirs.
    """

    conditioning: Tensor
    modulation: Tensor
    tables: Tensor | None = None

    def row(self, index: int) -> TimeSignal:
        """One of the B, as a batch."""
        return TimeSignal(*(None if part is None else part[index : index + 1] for part in self))  # type: ignore[arg-type]

    def of_block(self, index: int) -> Tensor:
        """What a block takes as its modulation."""
        return self.modulation if self.tables is None else self.tables[:, index]


class TextSignal(NamedTuple):
    """Captions as the blocks take them: for each block (B, L, D), `CrossAttention.keys_values`, or partly known.

    mask: of all that are not known, (B, 1, 1, L), or the lengths of packed captions.
    """

    captions: Sequence[Tensor | PartlyKnown]
    mask: Tensor | TextLengths | None


class PixArtBlock(nn.Module):
    """Self-attention, caption cross-attention and MLP under a shared timestep signal.

    adaLN-single (PixArt-alpha, Sec. 2.3): the modulation is computed once a step for all blocks; a block owns only
    a table of offsets. Cross-attention is neither normalised nor modulated.
    """

    kernels = Kernels()

    def __init__(self, config: PixArtConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        compress = config.kv_compress
        compresses = compress is not None and index in compress.layers
        self.attn = SelfAttention(
            width,
            config.num_heads,
            qk_norm=config.qk_norm,
            sampling=compress.sampling if compress else "conv",
            sr_ratio=compress.scale_factor if compress and compresses else 1,
        )
        self.cross_attn = CrossAttention(width, config.num_heads)
        self.mlp = Mlp(width, hidden_features=int(width * config.mlp_ratio), act_layer=ApproxGelu)
        rate = config.drop_path * index / max(config.depth - 1, 1)
        self.drop_path = DropPath(rate) if rate > 0 else nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        tokens: Tensor,
        caption: Tensor | PartlyKnown,
        text: Tensor | TextLengths | None,
        modulation: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """tokens (B, N, D), caption and text as `CrossAttention` takes them -> (B, N, D).

        modulation: (B, 6 * D), of all blocks; or (B, 6, D), with this block's table added.
        """
        has_table = modulation.ndim == 3
        table = modulation if has_table else self.scale_shift_table + modulation.unflatten(1, (6, -1))  # (B, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unsqueeze(2).unbind(1)  # each (B, 1, D)
        fused = self.kernels.fused
        tokens, normed = kept_norm(tokens, shift1, scale1, fused=fused)
        attended = self.attn(normed, grid)
        tokens = gated_residual(tokens, self.drop_path(attended), gate1, fused=fused)
        captioned = self.cross_attn(tokens, caption, text)
        tokens, normed = residual_norm(tokens, captioned, shift2, scale2, fused=fused)
        changed = gelu_mlp(normed, self.mlp, fused=fused, form=self.kernels.mlp)
        return gated_residual(tokens, self.drop_path(changed), gate2, fused=fused)


class FinalLayer(nn.Module):
    """Norm, modulation by the timestep embedding itself, and projection to patches."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """tokens (B, N, D), conditioning (B, D) -> (B, N, patch_size^2 * out_channels)."""
        shift, scale = (self.scale_shift_table + conditioning[:, None]).chunk(2, dim=1)  # each (B, 1, D)
        return self.linear(modulated_norm(tokens, shift, scale))


class PixArt(LatentTransformer):
    """The network: noisy latents, timestep and caption in, noise (and variance) prediction out.

    Keyword arguments are those of `PixArtConfig`. A fresh model predicts exactly zero.

    Raises:
        ValueError: sizes that do not divide, see `PixArtConfig`.
    """

    default_overrides: ClassVar[dict[str, Any]] = {}
    config: PixArtConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.config = config = PixArtConfig(**{**self.default_overrides, **kwargs})
        width = config.hidden_size
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        self.register_buffer("pos_embed", self.position_embedding())
        self.t_embedder = ScalarEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config.caption_channels, width, config.model_max_length)
        if config.micro_condition:
            self.csize_embedder = SizeEmbedder(width // 3)
            self.ar_embedder = SizeEmbedder(width // 3)
        self.blocks = nn.ModuleList(PixArtBlock(config, index) for index in range(config.depth))
        self.final_layer = FinalLayer(config)
        initialize_weights(self)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        caption_embeds: Tensor,
        caption_mask: Tensor | None = None,
        *,
        img_hw: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        before_block: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise (first C channels) and, with pred_sigma, the variance interpolation (last C).

        Args:
            latents: (B, C, h, w), scaled; h and w divisible by patch_size.
            timesteps: (B,) in [0, 1000), integer or fractional.
            caption_embeds: (B, L, caption_channels) of the text encoder.
            caption_mask: (B, L), True (or 1) = keep; None = every token. At least one token a caption.
            img_hw: (B, 2) picture height and width in pixels; needed by, and only by, micro_condition.
            aspect_ratio: (B,) height / width; likewise.
            before_block: called with a block's index and arguments, gives the tokens it gets (see `ControlPixArt`).
        Returns:
            (B, out_channels, h, w).
        Raises:
            ValueError: sizes that do not divide, or size conditions missing or unexpected.
        """
        time = self.embed_time(timesteps, img_hw=img_hw, aspect_ratio=aspect_ratio)
        text = self.embed_text(caption_embeds, caption_mask)
        return self.predict(latents, time, text, before_block=before_block)

    def embed_time(
        self, timesteps: Tensor, *, img_hw: Tensor | None = None, aspect_ratio: Tensor | None = None
    ) -> TimeSignal:
        """What timesteps (B,) and size conditions say to the blocks; see `forward`."""
        conditioning = self._conditioning(timesteps, img_hw, aspect_ratio)
        return TimeSignal(conditioning, self.t_block(conditioning))

    def with_tables(self, time: TimeSignal, copies: Sequence[PixArtBlock] = ()) -> TimeSignal:
        """The same with the table of each block added, which serves a solver for all that it draws.

        Args:
            copies: further blocks (of a ControlNet), whose tables come after those of the base.
        """
        tables = [block.scale_shift_table for block in [*self.blocks, *copies]]
        if any(table.device != time.modulation.device for table in tables):  # a memory plan brings them block by block
            return time
        return time._replace(tables=torch.stack(tables) + time.modulation.unflatten(1, (6, -1))[:, None])

    def embed_text(
        self,
        caption_embeds: Tensor,
        caption_mask: Tensor | None,
        *,
        project: bool = False,
        copies: Sequence[PixArtBlock] = (),
        alone: int = 0,
    ) -> TextSignal:
        """What captions say to the blocks; see `forward`.

        Args:
            project: go on to the keys and values of each block, which serve all steps of a solver.
            copies: further blocks that need theirs (of a ControlNet).
            alone: so many captions, the first ones, keep their first token alone (T5 of an empty text); with `project`
                their part of cross-attention is worked out here.
        """
        embeds, blocks = caption_embeds.to(self.dtype), [*self.blocks, *copies]
        alone = alone if project else 0
        others = None if caption_mask is None else caption_mask[alone:]
        caption, mask = self._text(self.y_embedder(embeds[alone:]), others)
        if not project:
            return TextSignal([caption] * len(blocks), mask)
        pairs = [block.cross_attn.keys_values(caption) for block in blocks]
        if not alone:
            return TextSignal(pairs, mask)
        first = self.y_embedder(embeds[:alone, :1])
        known = [block.cross_attn.of_one_token(first) for block in blocks]
        return TextSignal([PartlyKnown(*parts) for parts in zip(known, pairs)], mask)

    def predict(
        self, latents: Tensor, time: TimeSignal, text: TextSignal, *, before_block: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """`forward` from embedded conditions; a single row of `time` serves all B."""
        tokens = self._stream(self.embed_latents(latents))  # (B, N, D)
        grid = self._token_grid(latents)
        tokens = self.run_blocks(tokens, time, text, grid, before_block=before_block)
        return self.read_out(tokens, time, grid)

    def run_blocks(
        self,
        tokens: Tensor,
        time: TimeSignal,
        text: TextSignal,
        grid: tuple[int, int],
        *,
        span: slice = slice(None),
        before_block: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Tokens (B, N, D) through the blocks of `span`."""
        for index in range(len(self.blocks))[span]:
            arguments = (tokens, text.captions[index], text.mask, time.of_block(index), grid)
            if before_block is not None:
                arguments = (before_block(index, *arguments), *arguments[1:])
            tokens = self._run_block(index, *arguments)
        return tokens

    def read_out(self, tokens: Tensor, time: TimeSignal, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, D) of the last block -> (B, out_channels, h, w)."""
        return self._unpatchify(self.final_layer(tokens, time.conditioning), grid)

    def _text(self, caption: Tensor, caption_mask: Tensor | None) -> tuple[Tensor, Tensor | TextLengths | None]:
        """(B, L, D) and (B, L) as the blocks take them: with a mask that broadcasts, or packed."""
        if caption_mask is not None and self.kernels.text == "packed":
            return pack(caption, caption_mask)
        return caption, expand_caption_mask(caption_mask)

    def _conditioning(self, timesteps: Tensor, img_hw: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        conditioning = self.t_embedder(timesteps)
        if not self.config.micro_condition:
            if img_hw is not None or aspect_ratio is not None:
                raise ValueError("this model has micro_condition=False and takes no img_hw or aspect_ratio")
            return conditioning
        if img_hw is None or aspect_ratio is None:
            raise ValueError("this model has micro_condition=True and needs img_hw (B, 2) and aspect_ratio (B,)")
        size = self.csize_embedder(img_hw)  # (B, 2 * D / 3)
        ratio = self.ar_embedder(aspect_ratio.reshape(-1, 1))  # (B, D / 3)
        return conditioning + torch.cat([size, ratio], dim=1)


class PixArtMS(PixArt):
    """PixArt for many sizes: size and ratio conditions are on unless micro_condition=False (Sigma)."""

    default_overrides: ClassVar[dict[str, Any]] = {"micro_condition": True}


CONFIG_FIELDS = frozenset(field.name for field in fields(PixArtConfig))
