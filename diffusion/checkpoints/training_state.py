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
# 2: trainer.json also holds the open metrics window and the identity of the data. `training.state` reads version 1.
FORMAT_VERSION = 2
_NAME = re.compile(r"^checkpoint-(\d+)$")


def staging_folder(root: Path, step: int) -> Path:
    """An empty folder beside the checkpoints, on the same file system."""
    folder = staging_name(root, f"checkpoint-{step}")
    folder.mkdir(parents=True)
    return folder


def staging_name(root: Path, name: str) -> Path:
    """A hidden name beside the checkpoints that `remove_stale` knows."""
    return root / f".tmp-{name}-{uuid.uuid4().hex[:8]}"


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
    """None if a checkpoint is whole, else what is wrong with it.

    Raises:
        CheckpointError: it is not damaged, but cannot be read: a newer format, or no permission.
    """
    try:
        return _problem(folder, hashes)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename} may not be read (permission denied); mend its permissions") from error


def _problem(folder: Path, hashes: bool) -> str | None:
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, entries = manifest["format_version"], manifest["files"]
    except PermissionError:
        raise
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({error!r})"
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, written by a newer version of this program; this one reads up to "
            f"{FORMAT_VERSION}: update it, or name an older checkpoint"
        )
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
    """The newest whole checkpoint; damaged newer ones are renamed `.corrupt`, loudly. None if there never were any.

    Raises:
        CheckpointError: there are checkpoints, but none is whole (a run never restarts from zero by itself), or one is
            of a newer format or may not be read.
    """
    for _, folder in reversed(list_checkpoints(root)):
        problem = verify(folder)
        if problem is None:
            return folder
        LOGGER.warning("checkpoint %s is damaged: %s; it is renamed and the one before is used", folder, problem)
        set_aside(folder, "corrupt")
    if any(root.glob("checkpoint-*.corrupt*")):
        raise CheckpointError(f"no checkpoint in {root} is whole; restore one from a copy or start in a new --work-dir")
    return None


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint to `checkpoint-N.<why>` (or `.<why>-2`, ...): kept, but never resumed or rotated."""
    taken = len([*folder.parent.glob(f"{folder.name}.{why}*")])
    target = folder.with_name(f"{folder.name}.{why}" + (f"-{taken + 1}" if taken else ""))
    folder.rename(target)
    return target


def supersede_after(root: Path, step: int) -> None:
    """Set aside the checkpoints of later steps: the run goes on from an earlier one and writes them anew."""
    for later, folder in list_checkpoints(root):
        if later > step:
            kept = set_aside(folder, "superseded")
            LOGGER.warning("going on from step %d: %s is kept as %s", step, folder, kept.name)


def remove_stale(root: Path) -> None:
    """Delete what interrupted saves left behind."""
    for path in root.glob(".tmp-checkpoint-*"):
        shutil.rmtree(path)


def rotate(root: Path, limit: int | None, keep: Path | None = None, keep_every: int | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`.

    Args:
        keep: is never deleted (the one the run resumed from).
        keep_every: multiples of so many steps are never deleted and do not count.
    """
    if limit is None:
        return
    counted = [folder for step, folder in list_checkpoints(root) if keep_every is None or step % keep_every]
    for folder in counted[:-limit]:
        if folder == keep:
            continue
        # One rename takes it away whole: killed while it deletes, a run does not find half a checkpoint.
        doomed = folder.rename(staging_name(root, folder.name))
        shutil.rmtree(doomed)


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
