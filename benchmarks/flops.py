"""FLOPs of PixArt's work, from shapes alone: the numerator of every TFLOP/s that this folder reports.

One multiply-add is two FLOPs. Only matrix products count (linear layers, convolutions, attention); what a fast path
avoids by caching is counted all the same, so that arms that do the same task have one numerator.
"""

from __future__ import annotations

from typing import Any

TRAINING_FACTOR = 3  # a backward pass is two forward passes; recomputed activations are not useful work


def forward_flops(config: Any, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one pass of `PixArt` for one picture.

    With N image tokens, T text tokens and width d, a block takes 28 N d^2 in its linear layers (qkv 3, output 1,
    cross-attention's q and output 2, MLP 8, each 2 N d^2), 4 T d^2 in text keys and values, 4 N^2 d in self-attention
    and 4 N T d in cross-attention. XL/2 with 120 text tokens: 0.298, 1.236 and 6.510 TFLOP at 256, 512, 1024 px.

    Args:
        config: `PixArtConfig` without key-value compression, which this formula does not know.
    Raises:
        ValueError: the config compresses keys and values.
    """
    if config.kv_compress is not None:
        raise ValueError("forward_flops knows no key-value compression; count such a network with FlopCounterMode")
    d, n, t = config.hidden_size, image_tokens, text_tokens
    linear = (12 + 4 * config.mlp_ratio) * n * d * d
    block = linear + 4 * t * d * d + 4 * n * n * d + 4 * n * t * d
    patches = 2 * n * d * config.patch_size**2 * (config.in_channels + config.out_channels)
    caption = 2 * t * (config.caption_channels * d + d * d)
    time = 2 * (256 * d + d * d) + 2 * d * 6 * d
    sizes = 3 * 2 * (256 * (d // 3) + (d // 3) ** 2) if config.micro_condition else 0
    return round(config.depth * block + patches + caption + time + sizes)


def training_flops(config: Any, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of a training step for one picture."""
    return TRAINING_FACTOR * forward_flops(config, image_tokens, text_tokens)


def counted_flops(work: Any) -> int:
    """FLOPs of a call, counted by torch: for VAE and T5, on the meta device, where it costs nothing."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows no attention kernel of the CPU; the plain one is matrix products to it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
