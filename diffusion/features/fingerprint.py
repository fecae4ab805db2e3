"""What determines a feature: encoders, settings, source. Features of another fingerprint are never mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.files import add_file
from diffusion.images import vae_folder
from diffusion.text import text_folders

_HASHED_AT_START_BYTES = 2_000_000_000


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over names and contents of files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        add_file(digest, path)
    return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """sha256 of the model or tokenizer files directly in a folder."""
    return hash_files(path for path in folder.iterdir() if path.is_file())


def encoder_hashes(text: Path, vae: Path) -> dict[str, str]:
    """Hashes of the tokenizer, the T5 encoder and the VAE of pipeline folders. Raises CheckpointError."""
    tokenizer, text_encoder = text_folders(text)
    folders = {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae_folder(vae)}
    return {name: hash_folder(folder) for name, folder in folders.items()}


def check_encoders(place: str, stored: Mapping[str, Any], pipeline: str | Path) -> None:
    """Refuse features that other encoders made than those of the pipeline that shall draw from them.

    A text encoder above 2 GB is not hashed here, as that would take every start of a run many seconds.

    Raises:
        DataError: the parts that differ, and the remedy. CheckpointError: the pipeline lacks one.
    """
    tokenizer, text_encoder = text_folders(pipeline)
    folders = {"tokenizer": tokenizer, "vae": vae_folder(pipeline)}
    if sum(path.stat().st_size for path in text_encoder.iterdir() if path.is_file()) < _HASHED_AT_START_BYTES:
        folders["text_encoder"] = text_encoder
    differing = [name for name, folder in folders.items() if name in stored and hash_folder(folder) != stored[name]]
    if differing:
        raise DataError(
            f"{place} was extracted with another {' and '.join(differing)} than pipeline_load_from={str(pipeline)!r} "
            f"holds; set pipeline_load_from to the folder it was made with, or run `python tools/extract_features.py "
            f"SOURCE --out NEW_FOLDER --pretrained {pipeline}`"
        )
