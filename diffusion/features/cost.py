"""What an extraction will cost, before it runs: bytes of the store from shapes, seconds from arithmetic or a trial."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from diffusion.devices import matmul_rate
from diffusion.features.extract import Encoders, compute_dtype
from diffusion.features.rows import DTYPES
from diffusion.features.sources import Sample
from diffusion.features.stages import Block, ExtractionSettings, encode_blocks
from diffusion.images import vae_factor

_SHARE = 0.4  # of the rate of square matrix products that the encoders reach, roughly, on cards and CPUs


def feature_bytes(
    encoders: Encoders, settings: ExtractionSettings, *, pictures: int, captions: int, tokens: float, area: float
) -> int:
    """Bytes of a store of `pictures` of `area` px each and `captions` of `tokens` each."""
    text, vae = encoders.configs()
    width = DTYPES[settings.dtype].itemsize
    latents = 2 * vae["latent_channels"] * area / vae_factor(vae) ** 2 * width
    return round(pictures * latents + captions * tokens * text["d_model"] * width)


def encoding_seconds(
    encoders: Encoders,
    settings: ExtractionSettings,
    device: torch.device,
    *,
    pictures: int,
    captions: int,
    tokens: float,
    area: float,
) -> float:
    """Seconds of T5 and the VAE on one device, by their operations and the device's rate of matrix products.

    Right to a factor of two or so; no weights are read.
    """
    text, vae = encoders.configs()
    work = captions * tokens * _text_flops_per_token(text) + pictures * _vae_flops(vae, area)
    side = 8192 if device.type == "cuda" else 1024
    return work / (_SHARE * matmul_rate(device, side, compute_dtype(device, settings)))


def measured_seconds(
    samples: Sequence[Sample], count: int, encoders: Encoders, settings: ExtractionSettings, device: torch.device
) -> float:
    """Seconds for `count` pictures, by extracting `samples`, decoding included, with the encoders themselves."""
    encoder, vae = encoders.load_text(device, settings), encoders.load_vae(device, settings)
    seconds = 0.0
    for _ in range(2):  # the first round warms up
        started = time.perf_counter()
        list(encode_blocks([Block(0, samples)], settings, encoder, vae))
        seconds = time.perf_counter() - started
    return seconds * count / len(samples)


def _text_flops_per_token(text: dict[str, Any]) -> float:
    """Of T5's encoder: projections and feed-forward; attention itself adds a few percent at caption lengths."""
    inner = text["num_heads"] * text["d_kv"]
    gated = str(text.get("feed_forward_proj", "")).startswith("gated")
    weights = 4 * text["d_model"] * inner + (3 if gated else 2) * text["d_model"] * text["d_ff"]
    return 2.0 * weights * int(text["num_layers"])


def _vae_flops(vae: dict[str, Any], area: float) -> float:
    """Of encoding a picture of `area` px, counted on the network without weights."""
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    factor = vae_factor(vae)
    side = max(1, round(math.sqrt(area) / factor)) * factor
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        AutoencoderKL.from_config(vae).encode(torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops()) * area / side**2
