"""A request on its way through the queue, and what its page hears of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffusion.web.asking import Asked

FINAL = ("done", "stopped", "failed")


@dataclass(frozen=True)
class Progress:
    """What happened: stage is "waiting", "drawing" or one of `FINAL`.

    Args:
        place: in the queue, 1 = next. picture, pictures, step, steps: counted from 1; step 0 = before the first.
        preview: of the latents, a small picture. paths, seeds: of what is drawn so far.
        message: for the user, when it failed. notices: what was cut or is unusual.
    """

    stage: str
    place: int = 0
    picture: int = 1
    pictures: int = 1
    step: int = 0
    steps: int = 1
    preview: Image.Image | None = None
    paths: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = ()
    message: str = ""
    notices: tuple[str, ...] = ()


@dataclass(eq=False)
class Job:
    """asked by `user` in the browser tab (or API client) `session`; `tell` hears of its progress, in any thread."""

    asked: Asked
    user: str
    session: str
    tell: Callable[[Progress], None]
    paths: list[Path] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def end(self, stage: str, message: str = "") -> None:
        """Tell what came of it."""
        told = Progress(
            stage,
            pictures=self.asked.pictures,
            paths=tuple(self.paths),
            seeds=tuple(self.seeds),
            message=message,
            notices=tuple(dict.fromkeys(self.notices)),
        )
        self.tell(told)


class Stopped(Exception):
    """Raised between two steps of a job that was cancelled."""
