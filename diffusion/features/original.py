"""Feature files of the original's layouts: captions as `.npz`, VAE moments as `.npy`."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import DataError
from diffusion.files import write_atomically


def read_caption_npz(path: Path, max_length: int) -> Tensor:
    """Embedding of a caption file, (L, C), its padding removed.

    The file holds `caption_feature` (1, M, C) and mostly `attention_mask` (1, M); without a mask every token counts.

    Raises:
        DataError: missing, damaged, without the array, or without any token.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            embeds = content["caption_feature"]
            mask = content["attention_mask"] if "attention_mask" in content.files else None
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; extract its caption") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is no caption feature file ({error}); extract it again") from error
    embeds = embeds.reshape(-1, embeds.shape[-1])[:max_length]
    if mask is not None:
        embeds = embeds[mask.reshape(-1)[:max_length].astype(bool)]
    if len(embeds) == 0:
        raise DataError(f"{path} has no token under its mask; extract it again")
    return torch.from_numpy(np.ascontiguousarray(embeds))


def read_latents_npy(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a VAE file of (2C, h, w): float32 (C, h, w) each, unscaled.

    Raises:
        DataError: missing, damaged, or of another shape.
    """
    try:
        moments = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; extract its picture") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no VAE feature file ({error}); extract it again") from error
    return _moments(moments, path)


def read_condition_npz(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a condition's VAE file, `arr_0` (2C, h, w), as the original's HED features are.

    Raises:
        DataError: missing, damaged, or of another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            moments = content["arr_0"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; extract its edges") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is no condition feature file ({error}); extract it again") from error
    return _moments(moments, path)


def _moments(moments: np.ndarray, path: Path) -> tuple[Tensor, Tensor]:
    if moments.ndim != 3 or moments.shape[0] % 2:
        raise DataError(f"{path} has shape {moments.shape}, expected (2 x channels, h, w); extract it again")
    mean, std = torch.from_numpy(moments.astype(np.float32)).chunk(2)
    return mean, std


def write_caption_npz(path: Path, embeds: Tensor, max_length: int) -> None:
    """The original's file of a caption (L, C): float32 (1, max_length, C), padded with zeros, and its mask."""
    padded = np.zeros((1, max_length, embeds.shape[1]), np.float32)
    padded[0, : len(embeds)] = embeds.float().numpy()
    mask = (np.arange(max_length) < len(embeds)).astype(np.int64)[None]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, caption_feature=padded, attention_mask=mask)
    write_atomically(path, buffer.getvalue())


def write_latents_npy(path: Path, mean: Tensor, std: Tensor) -> None:
    """The original's VAE file: float32 (2C, h, w), mean then standard deviation, unscaled."""
    buffer = io.BytesIO()
    np.save(buffer, torch.cat([mean, std]).float().numpy())
    write_atomically(path, buffer.getvalue())


def feature_names(path: str) -> list[str]:
    """Names, without suffix, under which programs of the original store the features of a picture.

    For a/b/c.jpg: `a/b_c` (its data sets; the last slash becomes an underscore), `b_c` (its multi-scale extraction; cut
    at the first dot) and `c` (its single-scale extraction).
    """
    pure = PurePosixPath(path)
    parts = pure.with_suffix("").as_posix()
    return list(dict.fromkeys(["_".join(parts.rsplit("/", 1)), "_".join(pure.parts[-2:]).split(".")[0], pure.stem]))
