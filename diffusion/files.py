"""Files that are whole or absent, and folders that one living program holds at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
import weakref
from pathlib import Path
from typing import Any, TextIO

import xxhash

from diffusion.errors import WorkDirLockedError

TEMPORARY = ".tmp-"


def add_file(digest: Any, path: Path) -> Any:
    """Update a digest of hashlib or xxhash with a file's bytes, block by block; returns the digest."""
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, in hexadecimal: detects damage, not tampering."""
    return str(add_file(xxhash.xxh3_128(), path).hexdigest())


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file aside, sync it and rename it: whoever reads `path` sees the old or the new content, never a half.

    A process that is killed on the way leaves `.tmp-*` beside it. Raises OSError (disk full, read-only, ...).
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


class FolderLock:
    """An flock on FOLDER/.lock; the kernel releases it when its process ends, however it ends.

    Forked children (data-loading workers) give their copy back, so that they do not hold it after a kill -9 of the run.

    Args:
        flag: the argument that chose the folder, named in the error.
    Raises:
        WorkDirLockedError: another living program holds it (exit code 76).
    """

    def __init__(self, folder: Path, flag: str = "--work-dir") -> None:
        self.path = folder / ".lock"
        self._file: TextIO = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise WorkDirLockedError(
                f"{folder} is held by a running job ({holder}); wait for it or choose another {flag}"
            ) from None
        self._file.truncate(0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write(json.dumps(owner))
        self._file.flush()
        _HELD.add(self)

    def release(self) -> None:
        self._file.close()


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in _HELD:
        lock.release()  # closes the child's descriptor alone; the lock stays with the parent's


os.register_at_fork(after_in_child=_release_in_child)
