"""The folder of a run: one living run at a time, and no run starts over another's results."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from diffusion.errors import ConfigError, WorkDirLockedError


class WorkDirLock:
    """An flock on WORK/.lock; the kernel releases it when its process ends, however it ends.

    Raises:
        WorkDirLockedError: another living run holds it (exit code 76).
    """

    def __init__(self, work_dir: Path) -> None:
        self.path = work_dir / ".lock"
        self._file: TextIO = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise WorkDirLockedError(
                f"{work_dir} is held by a running job ({holder}); wait for it or choose another --work-dir"
            ) from None
        self._file.truncate(0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write(json.dumps(owner))
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def refuse_existing_run(work_dir: Path) -> None:
    """A new run needs a folder without checkpoints and metrics.

    Raises:
        ConfigError: the folder holds a run.
    """
    found = [name for name in ("metrics.jsonl", "checkpoints") if (work_dir / name).exists()]
    if found:
        raise ConfigError(
            f"--work-dir {work_dir} already holds a run ({', '.join(found)}); continue it with --resume-from latest "
            "or choose another folder"
        )
