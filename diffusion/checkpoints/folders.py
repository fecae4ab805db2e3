"""A result folder is whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from diffusion.errors import CheckpointError, StorageError
from diffusion.files import TEMPORARY


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill, beside `folder`; it takes that name when the block ends without an error.

    Raises:
        CheckpointError: the folder exists and is not empty. StorageError: the disk is full or not writable.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists; choose another folder or remove it first")
    aside = folder.parent / f"{TEMPORARY}{folder.name}-{uuid.uuid4().hex[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.mkdir()
        yield aside
        os.replace(aside, folder)
    except OSError as error:
        raise StorageError(f"{folder} could not be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes that name when the block ends without an error.

    Raises:
        CheckpointError: the file exists. StorageError: the disk is full or not writable.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists; choose another name or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise StorageError(f"{path} could not be written ({error})") from error
    finally:
        aside.unlink(missing_ok=True)
