"""The published PixArt models: where their files are, where they belong, and what their weights must look like.

Key and parameter counts were recorded by instantiating the original's classes, not by opening the files. Nobody has
published a list of checksums; the hub states the sha256 of every large file, and downloads are compared with that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion.errors import CheckpointError, did_you_mean
from diffusion.models import PixArt, PixArtMS

_RAIL = "openrail++"
_ALPHA, _SIGMA, _CONTROL = "PixArt-alpha/PixArt-alpha", "PixArt-alpha/PixArt-Sigma", "PixArt-alpha/PixArt-ControlNet"


@dataclass(frozen=True)
class Published:
    """One row of the README's tables.

    Args:
        name: by which it is asked for, the file's or repository's own.
        title: the model's name in the table.
        repo, pattern: the hub repository and its files (shell pattern).
        folder: below output/pretrained_models, where the repository's paths continue.
        licence: as the cards of the alpha 512 and 1024 px models say, taken for the family's others; downloads show the
            hub's own statement where it differs.
        kind: "transformer", "controlnet", "hed" or "parts".
    """

    name: str
    title: str
    repo: str
    pattern: str
    folder: str = ""
    licence: str = _RAIL
    kind: str = "transformer"


@dataclass(frozen=True)
class Recorded:
    """What the weights of a published file must be.

    Args:
        num_keys: of the native file, with position table and null caption; num_diffusers_keys: of a folder, without.
        num_parameters: without those two buffers.
        options: of the network class, at full size.
    """

    network: type[PixArt]
    options: dict[str, Any]
    num_keys: int
    num_parameters: int
    num_diffusers_keys: int
    control_blocks: int = 0


def _native(name: str, title: str, repo: str = _ALPHA, **fields: str) -> Published:
    return Published(name, title, repo, name, **fields)


def _folder(name: str, title: str, **fields: str) -> Published:
    return Published(name, title, f"PixArt-alpha/{name}", "*", folder=name, **fields)


PUBLISHED = (
    Published("T5", "T5 4.3B", _ALPHA, "t5-v1_1-xxl/*", "t5_ckpts", "apache-2.0", "parts"),
    Published("VAE", "VAE 80M", _ALPHA, "sd-vae-ft-ema/*", "", "mit", "parts"),
    _native("PixArt-XL-2-SAM-256x256.pth", "PixArt-α-SAM-256"),
    _native("PixArt-XL-2-256x256.pth", "PixArt-α-256"),
    _native("PixArt-XL-2-256x256-MSCOCO-FID732.pth", "PixArt-α-256-MSCOCO-FID7.32"),
    _native("PixArt-XL-2-512x512.pth", "PixArt-α-512"),
    _native("PixArt-XL-2-1024-MS.pth", "PixArt-α-1024"),
    _folder("PixArt-XL-2-SAM-256x256", "PixArt-α-SAM-256, diffusers"),
    _folder("PixArt-XL-2-256x256", "PixArt-α-256, diffusers"),
    _folder("PixArt-XL-2-512x512", "PixArt-α-512, diffusers"),
    _folder("PixArt-XL-2-1024-MS", "PixArt-α-1024, diffusers"),
    _folder("PixArt-LCM-XL-2-1024-MS", "PixArt-δ-1024-LCM, diffusers"),
    _native("ControlNetHED.pth", "ControlNet-HED-Encoder", licence="see the model card", kind="hed"),
    _native("PixArt-XL-2-512-ControlNet.pth", "PixArt-δ-512-ControlNet", _CONTROL, kind="controlnet"),
    _native("PixArt-XL-2-1024-ControlNet.pth", "PixArt-δ-1024-ControlNet", _CONTROL, kind="controlnet"),
    _folder("pixart_sigma_sdxlvae_T5_diffusers", "T5 and SDXL-VAE of PixArt-Σ", kind="parts"),
    _native("PixArt-Sigma-XL-2-256x256.pth", "PixArt-Σ-256", _SIGMA),
    _native("PixArt-Sigma-XL-2-512-MS.pth", "PixArt-Σ-512", _SIGMA),
    _native("PixArt-Sigma-XL-2-1024-MS.pth", "PixArt-Σ-1024", _SIGMA),
    _native("PixArt-Sigma-XL-2-2K-MS.pth", "PixArt-Σ-2K", _SIGMA),
    _folder("PixArt-Sigma-XL-2-256x256", "PixArt-Σ-256, diffusers"),
    _folder("PixArt-Sigma-XL-2-512-MS", "PixArt-Σ-512, diffusers"),
    _folder("PixArt-Sigma-XL-2-1024-MS", "PixArt-Σ-1024, diffusers"),
    _folder("PixArt-Sigma-XL-2-2K-MS", "PixArt-Σ-2K, diffusers"),
    _folder("PixArt-Alpha-DMD-XL-2-512x512", "PixArt-α-512-DMD, diffusers"),
)
# What tools/download.py fetches by default, as the original's did.
DEFAULT_NAMES = ("PixArt-XL-2-512x512.pth", "PixArt-XL-2-1024-MS.pth")
PARTS_NAMES = ("T5", "VAE")

_SIGMA_OPTIONS = {"micro_condition": False, "model_max_length": 300}
_PLAIN = (437, 610_856_096, 603)
_SIZED = (445, 611_349_152, 611)
_CONTROL_PARAMETERS = 294_917_760  # 13 copied blocks, before_proj and 13 after_proj: 223 keys


def _control(network: type[PixArt], options: dict[str, Any], keys: int, parameters: int, diffusers: int) -> Recorded:
    return Recorded(network, options, keys + 223, parameters + _CONTROL_PARAMETERS, diffusers, control_blocks=13)


_ALPHA_256 = Recorded(PixArt, {"input_size": 32}, *_PLAIN)
_ALPHA_512 = Recorded(PixArt, {"input_size": 64}, *_PLAIN)
_ALPHA_1024 = Recorded(PixArtMS, {"input_size": 128, "pe_interpolation": 2.0}, *_SIZED)
RECORDED: dict[str, Recorded] = {
    "PixArt-XL-2-SAM-256x256": _ALPHA_256,
    "PixArt-XL-2-256x256": _ALPHA_256,
    "PixArt-XL-2-256x256-MSCOCO-FID732": _ALPHA_256,
    "PixArt-XL-2-512x512": _ALPHA_512,
    "PixArt-Alpha-DMD-XL-2-512x512": _ALPHA_512,
    "PixArt-XL-2-1024-MS": _ALPHA_1024,
    "PixArt-LCM-XL-2-1024-MS": _ALPHA_1024,
    "PixArt-XL-2-512-ControlNet": _control(PixArt, {"input_size": 64}, *_PLAIN),
    "PixArt-XL-2-1024-ControlNet": _control(PixArtMS, {"input_size": 128, "pe_interpolation": 2.0}, *_SIZED),
    "PixArt-Sigma-XL-2-256x256": Recorded(
        PixArt, {"input_size": 32, "pe_interpolation": 0.5, **_SIGMA_OPTIONS}, *_PLAIN
    ),
    "PixArt-Sigma-XL-2-512-MS": Recorded(PixArtMS, {"input_size": 64, **_SIGMA_OPTIONS}, *_PLAIN),
    "PixArt-Sigma-XL-2-1024-MS": Recorded(
        PixArtMS, {"input_size": 128, "pe_interpolation": 2.0, **_SIGMA_OPTIONS}, *_PLAIN
    ),
    "PixArt-Sigma-XL-2-2K-MS": Recorded(
        PixArtMS, {"input_size": 256, "pe_interpolation": 4.0, **_SIGMA_OPTIONS}, *_PLAIN
    ),
}


def find_published(name: str) -> Published:
    """The row with this name.

    Raises:
        CheckpointError: there is none; the nearest name, or all of them.
    """
    rows = {row.name: row for row in PUBLISHED}
    if name not in rows:
        raise CheckpointError(
            f"{name!r} is no published PixArt file; {did_you_mean(name, rows)} (all: tools/download.py --list)"
        )
    return rows[name]
