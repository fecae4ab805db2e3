"""One picture decoded by several processes: each computes a strip of rows, with the VAE's own weights and result.

Legend: B pictures, C channels, h x w of a feature map, P processes, G groups of a norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.images.vae import decode_latents


class SharedDecoder:
    """Decodes as `decode_latents` does, called by all processes with equal latents; each gets the whole pictures.

    Convolutions see the neighbours' rows, norms the statistics of all strips, attention all keys and values. Between
    calls the VAE is what it was.

    Args:
        vae: an AutoencoderKL.
    """

    def __init__(self, vae: Any) -> None:
        from diffusers.models.attention_processor import Attention

        self.vae = vae
        self._forwards: list[tuple[Any, Callable[..., Tensor]]] = []  # made once: torch.compile looks at their identity
        for module in vae.decoder.modules():
            if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
                self._forwards.append((module, partial(_convolve, module)))
            elif isinstance(module, nn.GroupNorm):
                self._forwards.append((module, partial(_normalise, module)))
            elif isinstance(module, Attention):
                self._forwards += [(linear, partial(_project, linear)) for linear in (module.to_k, module.to_v)]

    def fits(self, rows: int) -> bool:
        """Whether latents of so many rows make equal strips."""
        return rows % dist.get_world_size() == 0

    @torch.no_grad()
    def __call__(self, latents_scaled: Tensor, device: torch.device | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, 8h, 8w) float32."""
        strip = latents_scaled.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]
        try:
            for module, forward in self._forwards:
                module.forward = forward
            pixels = decode_latents(self.vae, strip, device)
        finally:
            for module, _ in self._forwards:
                del module.forward  # the class's again
        return torch.cat(_gathered(pixels), dim=2)


def _gathered(strip: Tensor) -> list[Tensor]:
    """The strips of all processes, in their order, which is that of the rows."""
    strip = strip.contiguous()
    strips = [torch.empty_like(strip) for _ in range(dist.get_world_size())]
    dist.all_gather(strips, strip)
    return strips


def _convolve(conv: nn.Conv2d, strip: Tensor) -> Tensor:
    """A convolution of 3 x 3: (B, C, h / P, w) with the last row of the strip above and the first of the one below."""
    edges = _gathered(torch.stack([strip[:, :, 0], strip[:, :, -1]]))  # (2, B, C, w) of each process
    rank, nothing = dist.get_rank(), torch.zeros_like(strip[:, :, 0])
    above = edges[rank - 1][1] if rank > 0 else nothing
    below = edges[rank + 1][0] if rank + 1 < len(edges) else nothing
    padded = torch.cat([above.unsqueeze(2), strip, below.unsqueeze(2)], dim=2)
    return F.conv2d(padded, conv.weight, conv.bias, padding=(0, 1))


def _normalise(norm: nn.GroupNorm, strip: Tensor) -> Tensor:
    """(B, C, ...): statistics of equal strips add up to those of the whole (Chan et al. 1983)."""
    grouped = strip.unflatten(1, (norm.num_groups, -1)).flatten(2).float()  # (B, G, numbers)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    variances, means = torch.stack(_gathered(torch.stack([variance, mean])), dim=1)  # (P, B, G) each
    variance = variances.mean(0) + means.var(0, correction=0)
    normed = (grouped - means.mean(0).unsqueeze(2)) * torch.rsqrt(variance + norm.eps).unsqueeze(2)
    per_channel = (1, -1, *[1] * (strip.ndim - 2))
    weight, bias = (parameter.float().view(per_channel) for parameter in (norm.weight, norm.bias))
    return (normed.view(strip.shape) * weight + bias).to(strip.dtype)


def _project(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """(B, n / P, C) -> keys or values of all tokens (B, n, C)."""
    return torch.cat(_gathered(F.linear(tokens, linear.weight, linear.bias)), dim=1)
