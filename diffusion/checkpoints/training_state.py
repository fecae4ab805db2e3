"""Checkpoints of a run that are either whole or absent.

A checkpoint is written aside, every file is synced and hashed into manifest.json, and one rename makes it
`checkpoint-N`. There is no pointer file: the latest checkpoint is the highest N whose manifest verifies.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from diffusion.errors import CheckpointError, StorageError
from diffusion.files import hash_file, sync

LOGGER = logging.getLogger("pixart")
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"^checkpoint-(\d+)$")


def staging_folder(root: Path, step: int) -> Path:
    """An empty folder beside the checkpoints, on the same file system."""
    folder = root / f".tmp-checkpoint-{step}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def commit(staging: Path, root: Path, step: int) -> Path:
    """Hash, sync and rename a staged checkpoint; the rename is the commit point.

    Saving a step that is already committed (and whole) keeps the committed one.
    """
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    entries = {
        path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        for path in files
    }
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": entries}, indent=1))
    sync(manifest)
    for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
        sync(folder)
    final = root / f"checkpoint-{step}"
    if final.exists():
        shutil.rmtree(staging)
        return final
    staging.rename(final)
    sync(root)
    return final


def verify(folder: Path, *, hashes: bool = True) -> str | None:
    """None if a checkpoint is whole, else what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} is missing or damaged ({error})"
    if manifest.get("format_version", 0) > FORMAT_VERSION:
        return f"format version {manifest['format_version']} is newer than this program's {FORMAT_VERSION}"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if hashes and hash_file(path) != entry["xxh3_128"]:
            return f"{name} is damaged (its hash differs)"
    return None


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, ascending."""
    found = [(int(match[1]), path) for path in root.glob("checkpoint-*") if (match := _NAME.match(path.name))]
    return sorted(found)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint; damaged newer ones are renamed `.corrupt`, loudly. None if there are none at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; a run never restarts from zero by itself.
    """
    candidates = list_checkpoints(root)
    for _, folder in reversed(candidates):
        problem = verify(folder)
        if problem is None:
            return folder
        LOGGER.warning("checkpoint %s is damaged: %s; it is renamed and the one before is used", folder, problem)
        folder.rename(folder.with_name(f"{folder.name}.corrupt"))
    if candidates:
        raise CheckpointError(f"no checkpoint in {root} is whole; restore one from a copy or start in a new --work-dir")
    return None


def remove_stale(root: Path) -> None:
    """Delete what interrupted saves left behind."""
    for path in root.glob(".tmp-checkpoint-*"):
        shutil.rmtree(path)


def rotate(root: Path, limit: int | None, keep: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but never `keep` (the one the run resumed from)."""
    if limit is None:
        return
    for _, folder in list_checkpoints(root)[:-limit]:
        if folder != keep:
            shutil.rmtree(folder)


def require_free_space(root: Path, needed_bytes: int) -> None:
    """Refuse a save that would fill the disk.

    Raises:
        StorageError: needed bytes exceed 90 % of the free ones.
    """
    free = shutil.disk_usage(root).free
    if needed_bytes > 0.9 * free:
        raise StorageError(
            f"a checkpoint needs {needed_bytes / 2**20:.0f} MiB, {root} has {free / 2**20:.0f} MiB free; make room"
        )


def save_checkpoint(root: Path, step: int, needed_bytes: int, write: Callable[[Path], None]) -> Path:
    """Stage, fill by `write(folder)`, commit. On any failure nothing is left behind."""
    root.mkdir(parents=True, exist_ok=True)
    require_free_space(root, needed_bytes)
    staging = staging_folder(root, step)
    try:
        write(staging)
        return commit(staging, root, step)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
