"""The VAE: loading, pictures -> latent moments, latents -> pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion.errors import CheckpointError, first_line


def vae_folder(folder: str | Path) -> Path:
    """`folder/vae` of a diffusers pipeline, or `folder` itself when it is a VAE. Raises CheckpointError if neither."""
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give a local diffusers pipeline or AutoencoderKL folder")
    found = root / "vae" if (root / "vae").is_dir() else root
    if not (found / "config.json").is_file():
        raise CheckpointError(f"{found}: no config.json of an AutoencoderKL; give a diffusers pipeline or VAE folder")
    return found


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels that a latent covers along each side, by the config of a VAE."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def load_vae(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Any:
    """Load a diffusers VAE (eval mode, frozen) from local files: AutoencoderKL, or DALL-E 3's consistency decoder.

    `variant` is of the names of the weight files ("fp16"). Raises CheckpointError.
    """
    from diffusers import AutoencoderKL, ConsistencyDecoderVAE

    from diffusion.images.upsampling import fold_upsampling

    found = vae_folder(folder)
    try:
        name = json.loads((found / "config.json").read_text(encoding="utf-8")).get("_class_name")
        cls = ConsistencyDecoderVAE if name == "ConsistencyDecoderVAE" else AutoencoderKL
        vae = cls.from_pretrained(str(found), local_files_only=True, torch_dtype=dtype, variant=variant)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{found}: the VAE cannot be loaded ({first_line(error)})") from error
    fold_upsampling(vae)
    return vae.to(device).eval().requires_grad_(False)


def compile_encoder(vae: Any) -> Any:
    """The same VAE with its encoder compiled; the first pictures of each shape wait for that, half a minute on a card.

    On a card its weights are in NHWC then, where cuDNN's 16-bit convolutions want them. Not compiled, NCHW is the
    faster layout there: torch's group norm is slow in the other.
    """
    if vae.device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    vae.encoder.compile()
    return vae


@torch.no_grad()
def encode_moments(vae: Any, pixels: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and standard deviation of the posterior, (B, C, H/8, W/8) float32 each.

    Unscaled: multiply a sample by `vae.config.scaling_factor` before it enters the model.
    device: where an offloaded VAE computes; None = where it lies.
    """
    posterior = vae.encode(_laid_out(pixels.to(device=device or vae.device, dtype=vae.dtype))).latent_dist
    return posterior.mean.float().contiguous(), posterior.std.float().contiguous()


@torch.no_grad()
def decode_latents(
    vae: Any,
    latents_scaled: Tensor,
    device: torch.device | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """(B, C, h, w) latents as the model makes them (scaled) -> (B, 3, 8h, 8w) float32 pixels, about [-1, 1].

    device: where an offloaded VAE computes; None = where it lies. generators: one a picture, for a VAE that draws noise
    when it decodes (the consistency decoder).
    """
    latents = latents_scaled.to(device=device or vae.device, dtype=vae.dtype) / vae.config.scaling_factor
    given = None if generators is None else list(generators)
    return vae.decode(_laid_out(latents), generator=given).sample.float().contiguous()


def _laid_out(x: Tensor) -> Tensor:
    """The same values, on a CPU in NHWC: oneDNN convolves in it, and turns the tensors of every layer around otherwise.

    Layers keep the layout of what they are given. Other devices get what the caller chose.
    """
    onednn = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return x.contiguous(memory_format=torch.channels_last) if onednn else x
