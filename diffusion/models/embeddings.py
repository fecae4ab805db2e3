"""Embeddings of position, time, size and caption. Legend: B batch, N image tokens, L text tokens, D width."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion.models.mlp import Mlp


class ApproxGelu(nn.GELU):
    """GELU in its tanh form, the one PixArt was trained with."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


def sincos_position_embedding(
    width: int, grid: tuple[int, int], base_size: int, pe_interpolation: float = 1.0
) -> Tensor:
    """Fixed sine-cosine position embedding of a token grid.

    Coordinates always span [0, base_size / pe_interpolation), whatever the grid (PixArt-alpha, Sec. 2.4 after
    DiffFit), so a model trained at one size starts well at another. The first half of the channels encodes the
    column, the second half the row; sines come before cosines.

    Args:
        width: D, divisible by 4.
        grid: token rows and columns.
        base_size: tokens a side at the model's training size.
        pe_interpolation: stretch of the coordinates, e.g. 2 for 1024 px models.
    Returns:
        (1, rows * cols, D) float32, row-major.
    """
    if width % 4:
        raise ValueError(f"width={width} must be divisible by 4 for a 2-D sine-cosine embedding")
    rows, cols = grid
    # Coordinates are rounded to float32 before the float64 product: the published weights saw exactly these values.
    row_coords = (torch.arange(rows, dtype=torch.float32) / (rows / base_size) / pe_interpolation).double()
    col_coords = (torch.arange(cols, dtype=torch.float32) / (cols / base_size) / pe_interpolation).double()
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def encode(coords: Tensor) -> Tensor:
        angles = torch.outer(coords, omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, D / 2)

    by_col = encode(col_coords).repeat(rows, 1)  # (rows * cols, D / 2)
    by_row = encode(row_coords).repeat_interleave(cols, dim=0)
    return torch.cat([by_col, by_row], dim=1).float().unsqueeze(0)


def sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """Sinusoidal features of raw scalars (timesteps, pixels, ratios), cosines first: (B,) -> (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """Sinusoid and a two-layer MLP: a scalar a sample to a vector. (B,) -> (B, width)."""

    def __init__(self, width: int, frequency_width: int = 256) -> None:
        super().__init__()
        self.frequency_width = frequency_width
        self.mlp = nn.Sequential(nn.Linear(frequency_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        # The sinusoid stays in float32: bf16 would round fractional solver times by up to 1.45 of 1000 steps.
        return self.mlp(sinusoid(values, self.frequency_width).to(next(self.mlp.parameters()).dtype))


class SizeEmbedder(ScalarEmbedder):
    """Embeds each of k numbers with one shared MLP and concatenates: (B, k) -> (B, k * width)."""

    def forward(self, values: Tensor) -> Tensor:
        batch = values.shape[0]
        return rearrange(super().forward(values.flatten()), "(b k) d -> b (k d)", b=batch)


class PatchEmbedder(nn.Module):
    """Non-overlapping patches to tokens: (B, C, h, w) -> (B, N, D), row-major."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        # A view would keep channels apart in memory, and every block after it would transpose what it reads.
        return rearrange(self.proj(latents), "b d h w -> b (h w) d").contiguous()


class CaptionEmbedder(nn.Module):
    """Projects T5 states to the model's width; holds the stored null caption of the original's convention.

    `y_embedding` is a plain buffer: saved with the weights, copied by the EMA, never optimised.
    """

    y_embedding: Tensor

    def __init__(self, caption_channels: int, width: int, max_length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_features=width, out_features=width, act_layer=ApproxGelu)
        self.register_buffer("y_embedding", torch.empty(max_length, caption_channels))
        self.reset_null_caption()

    def reset_null_caption(self) -> None:
        """Draw the null caption: normal, of about unit length a token."""
        torch.nn.init.normal_(self.y_embedding, std=self.y_embedding.shape[1] ** -0.5)

    def forward(self, caption_embeds: Tensor) -> Tensor:
        """(B, L, caption_channels) -> (B, L, D)."""
        return self.y_proj(caption_embeds)
