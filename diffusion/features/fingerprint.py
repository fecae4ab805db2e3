"""What determines a feature: encoders, settings, source. Features of another fingerprint are never mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over names and contents of files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """sha256 of the model or tokenizer files directly in a folder."""
    return hash_files(path for path in folder.iterdir() if path.is_file())


def hash_names(names: Iterable[str]) -> str:
    """sha256 of names, in the order given."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
