"""Interrupting whatever writes files, at every operation in turn: CPython announces each to audit hooks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Trap:
    """The one hook of this process (they cannot be removed), asleep unless a test arms it."""

    on_event: Callable[[str, Path], None] | None = None
    root = Path()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on_event is None or event not in _EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = Path(os.fsdecode(arguments[0]))
        # shutil.rmtree names what it removes relative to an open folder.
        if path.is_relative_to(self.root) or (event in ("os.remove", "os.rmdir") and not path.is_absolute()):
            writes = event == "open" and arguments[2] & _WRITING
            self.on_event("write" if writes else event, path)


_TRAP: _Trap | None = None


@contextlib.contextmanager
def watched(root: Path, on_event: Callable[[str, Path], None]) -> Iterator[None]:
    """Call on_event(event, path) before a file or folder below root is opened, renamed, made or removed.

    Events: "write" (opened to write), "open" (to read, hash or sync), os.rename, os.mkdir, os.remove, os.rmdir.
    """
    global _TRAP
    if _TRAP is None:
        _TRAP = _Trap()
        sys.addaudithook(_TRAP)
    _TRAP.root, _TRAP.on_event = root, on_event
    try:
        yield
    finally:
        _TRAP.on_event = None


def killed_before(root: Path, number: int, job: Callable[[], None]) -> bool:
    """Run a job in a forked process that dies by SIGKILL before event `number` below root; whether it died."""

    def die(event: str, path: Path, count: list[int] = [number]) -> None:  # noqa: B006
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def mortal() -> None:
        with watched(root, die):
            job()

    return in_child(mortal)[0] == -signal.SIGKILL


def in_child(job: Callable[[], Any]) -> tuple[int, Any]:
    """Exit code of a job in a forked process, and the JSON value that it returned."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(job()).encode())
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, json.loads(text) if text else None
