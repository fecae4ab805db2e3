"""Errors that the person at the keyboard can mend, and the exit codes that schedulers act on.

A `PixArtError` carries one line: what, where, remedy. Entry scripts run through `run_cli`, which prints that
line on stderr and exits with the error's code; programming errors keep their traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import ClassVar

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STORAGE = 74
EXIT_PREEMPTED = 75
EXIT_WORK_DIR_LOCKED = 76
EXIT_NUMERICAL = 77
EXIT_PEER_LOST = 78
EXIT_INTERRUPTED = 130


class PixArtError(Exception):
    """A condition the user can mend; the message is one line naming what, where and the remedy."""

    exit_code: ClassVar[int] = EXIT_USER_ERROR


class ConfigError(PixArtError):
    """A config file, key, value or command-line argument is wrong."""


class DataError(PixArtError):
    """A picture, caption, feature shard or index is missing, damaged or inconsistent."""


class CheckpointError(PixArtError):
    """A checkpoint cannot be read, or does not fit the model."""


class PromptError(PixArtError):
    """A prompt, or a request to the sampler, is outside what the model accepts."""


class StorageError(PixArtError):
    """The disk is full, read-only or failing."""

    exit_code = EXIT_STORAGE


class WorkDirLockedError(PixArtError):
    """Another living run holds the work-dir."""

    exit_code = EXIT_WORK_DIR_LOCKED


class PreemptedError(PixArtError):
    """Training was asked to end (SIGTERM), saved and stopped; the same command with --resume-from latest goes on."""

    exit_code = EXIT_PREEMPTED


class NumericalError(PixArtError):
    """Training stopped because loss or gradients are not finite, or processes that should agree do not."""

    exit_code = EXIT_NUMERICAL


class DeviceMemoryError(PixArtError):
    """The device has too little memory for what was asked."""


class PeerLostError(PixArtError):
    """Another process of the run died or stands still."""

    exit_code = EXIT_PEER_LOST


def first_line(error: BaseException) -> str:
    """What an error of a library says, for the middle of a message: its first line, or its type where it is silent."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The remedy part of an unknown-name error: the nearest valid name, else the list of them."""
    choices = list(choices)
    by_lower = {choice.lower(): choice for choice in reversed(choices)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"did you mean {by_lower[close[0]]!r}?" if close else f"choose one of {', '.join(choices)}"


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
_PATH_ERRNOS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry script: `PixArtError`, disk errors and unusable paths become one line on stderr and an exit code.

    `PIXART_DEBUG=1` shows the traceback as well.
    """
    try:
        main()
    except (PixArtError, OSError) as error:
        explained = _explain(error)
        if explained is None or os.environ.get("PIXART_DEBUG") == "1":
            raise
        code, line = explained
        print(f"error: {' '.join(line.split(chr(10)))}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _explain(error: PixArtError | OSError) -> tuple[int, str] | None:
    """Exit code and line of an error that the user can mend; None for others, which keep their traceback."""
    if isinstance(error, PixArtError):
        return error.exit_code, str(error)
    if error.errno in _DISK_ERRNOS:
        return EXIT_STORAGE, str(error)
    if error.errno in _PATH_ERRNOS and error.filename is not None:
        return EXIT_USER_ERROR, f"{error.filename} cannot be used ({error.strerror}); choose another path or mend it"
    return None
