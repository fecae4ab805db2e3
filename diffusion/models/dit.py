"""DiT: the class-conditional Diffusion Transformer (arXiv:2212.09748) that PixArt's first training stage starts from.

Legend: B batch, C latent channels, h x w latent size, N image tokens, D width.
State-dict keys and shapes are those of the public DiT files, so `DiT-XL-2-256x256.pt` loads without renaming.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.models.attention import SelfAttention
from diffusion.models.embeddings import ApproxGelu, PatchEmbedder, ScalarEmbedder
from diffusion.models.initialization import initialize_linear, zero_
from diffusion.models.kernels import Kernels, gated_residual, gelu_mlp, modulated_norm
from diffusion.models.latent_transformer import LatentTransformer
from diffusion.models.mlp import Mlp


@dataclass(frozen=True)
class DiTConfig:
    """Everything that rebuilds a DiT. Fields are those of `PixArtConfig`, and:

    Args:
        num_classes: classes without the null class, which has the number num_classes.
        prediction_type: "epsilon", as all public DiT files, or "v_prediction".
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    pe_interpolation: float = 1.0
    num_classes: int = 1000
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads} and by 4")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size={self.input_size} must be divisible by patch_size={self.patch_size}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={self.prediction_type!r} must be epsilon or v_prediction")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def base_size(self) -> int:
        """Tokens a side at the training size."""
        return self.input_size // self.patch_size


class LabelEmbedder(nn.Module):
    """(B,) class numbers -> (B, D); the last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_ids: Tensor) -> Tensor:
        return self.embedding_table(class_ids)


class DiTBlock(nn.Module):
    """Self-attention and MLP, each modulated by a layer of the block's own (adaLN-Zero)."""

    kernels = Kernels()

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = SelfAttention(width, config.num_heads)
        self.mlp = Mlp(width, hidden_features=int(width * config.mlp_ratio), act_layer=ApproxGelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, N, D), conditioning (B, D) -> (B, N, D)."""
        modulation = self.adaLN_modulation(conditioning)[:, None]  # (B, 1, 6 * D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)  # each (B, 1, D)
        fused = self.kernels.fused
        attended = self.attn(modulated_norm(tokens, shift1, scale1, fused=fused), grid)
        tokens = gated_residual(tokens, attended, gate1, fused=fused)
        normed = modulated_norm(tokens, shift2, scale2, fused=fused)
        changed = gelu_mlp(normed, self.mlp, fused=fused, form=self.kernels.mlp)
        return gated_residual(tokens, changed, gate2, fused=fused)


class DiTFinalLayer(nn.Module):
    """Norm, modulation by a layer of its own, and projection to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """tokens (B, N, D), conditioning (B, D) -> (B, N, patch_size^2 * out_channels)."""
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, dim=2)
        return self.linear(modulated_norm(tokens, shift, scale))


class DiT(LatentTransformer):
    """Noisy latents, timestep and class in, noise (and variance) prediction out. Keywords: `DiTConfig`.

    A fresh model predicts exactly zero, and each of its blocks is the identity.

    Raises:
        ValueError: sizes that do not divide, see `DiTConfig`.
    """

    config: DiTConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.config = config = DiTConfig(**kwargs)
        width = config.hidden_size
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        self.register_buffer("pos_embed", self.position_embedding())
        self.t_embedder = ScalarEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = DiTFinalLayer(config)
        self._initialize()

    def _initialize(self) -> None:
        """DiT Sec. 3.2: Xavier for linear layers, std 0.02 for embedders, zero for modulations and the last layer."""
        initialize_linear(self)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        modulations: list[Any] = [block.adaLN_modulation for block in self.blocks]
        for modulation in [*modulations, self.final_layer.adaLN_modulation]:
            zero_(modulation[1])
        zero_(self.final_layer.linear)

    @property
    def null_class(self) -> int:
        """The class number that stands for "no class"."""
        return self.config.num_classes

    def conditioning(self, timesteps: Tensor, class_ids: Tensor) -> Tensor:
        """(B,), (B,) -> (B, D)."""
        return self.t_embedder(timesteps) + self.y_embedder(class_ids)

    def forward(self, latents: Tensor, timesteps: Tensor, class_ids: Tensor) -> Tensor:
        """Predict the noise (first C channels) and, with pred_sigma, the variance interpolation (last C).

        Args:
            latents: (B, C, h, w), scaled; h and w divisible by patch_size.
            timesteps: (B,) in [0, 1000), integer or fractional.
            class_ids: (B,) int64 in 0..num_classes; num_classes = no class.
        Returns:
            (B, out_channels, h, w).
        """
        grid = self._token_grid(latents)
        tokens = self._stream(self.embed_latents(latents))  # (B, N, D)
        conditioning = self.conditioning(timesteps, class_ids)  # (B, D)
        for index in range(len(self.blocks)):
            tokens = self._run_block(index, tokens, conditioning, grid)
        return self._unpatchify(self.final_layer(tokens, conditioning), grid)


DIT_CONFIG_FIELDS = frozenset(field.name for field in fields(DiTConfig))


@torch.no_grad()
def modulations(dit: DiT, timestep: float, class_id: int) -> tuple[list[Tensor], Tensor]:
    """What a DiT's layers add and scale by at one timestep and class: each block's (6, D), the last layer's (2, D)."""
    times = torch.full((1,), float(timestep), device=dit.device)
    conditioning = dit.conditioning(times, torch.full((1,), class_id, device=dit.device))
    blocks: list[Any] = list(dit.blocks)
    each = [block.adaLN_modulation(conditioning)[0].unflatten(0, (6, -1)) for block in blocks]
    return each, dit.final_layer.adaLN_modulation(conditioning)[0].unflatten(0, (2, -1))
