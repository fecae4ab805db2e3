"""The one worker behind a page: a fair queue, one job at a time, and what happens when a job fails."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Callable

import torch
from PIL import Image

from diffusion.errors import PixArtError, PromptError
from diffusion.web.artist import Artist
from diffusion.web.asking import Asked, check
from diffusion.web.jobs import Job, Progress, Stopped
from diffusion.web.line import FairLine
from diffusion.web.metrics import WebMetrics
from diffusion.web.settings import WebSettings

_logger = logging.getLogger("pixart.web")
_MAX_CANCELLED = 1000
_FAULT = "something went wrong here, not in your request; it is in the log. Please try again"


class Engine:
    """Takes requests from any thread and draws them in a thread of its own.

    Args:
        build: makes the artist; called again when a fault may have left the pipeline in pieces.
    """

    def __init__(self, build: Callable[[], Artist], settings: WebSettings) -> None:
        self._build, self.settings = build, settings
        self.artist = build()
        self._line: FairLine[Job] = FairLine(settings.limits.max_waiting, settings.limits.max_waiting_per_user)
        self._wake = threading.Condition()
        self._pipeline = threading.Lock()  # held while it computes
        self._current: Job | None = None
        self._cancelled: dict[str, float] = {}  # session -> when it was cancelled last; the newest are kept
        self._closed = False
        self.healthy = True
        self.metrics = WebMetrics(lambda: len(self._line))
        self._notices = _Notices(self)
        self._thread = threading.Thread(target=self._work, name="artist", daemon=True)

    def start(self) -> None:
        logging.getLogger("diffusion").addHandler(self._notices)
        logging.getLogger("diffusion").propagate = False  # notices of the pipeline quote prompts
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; waiting requests are told so."""
        with self._wake:
            self._closed = True
            unfinished = self._alive()
            self._wake.notify_all()
        for job in unfinished:
            self.stop(job)
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        logging.getLogger("diffusion").removeHandler(self._notices)
        logging.getLogger("diffusion").propagate = True

    def submit(
        self,
        asked: Asked,
        user: str,
        session: str,
        tell: Callable[[Progress], None],
        arrival: float = math.inf,
    ) -> Job:
        """Put a request into the queue. Raises PromptError when it is refused.

        Args:
            arrival: when it came in, in seconds of time.monotonic; it ends at once if its session was cancelled later.
        """
        try:
            if not self.healthy:
                raise PromptError("the app has to be started again after a fault; its log says why")
            check(asked, self.settings.limits)
            if asked.mode == "edges" and self.artist.pipeline.controlnet is None:
                raise PromptError("this page has no ControlNet to follow edges with; see docs/apps.md")
            job = Job(asked, user, session, tell)
            with self._wake:
                late = arrival <= self._cancelled.get(session, -math.inf)
                if not late:
                    self._line.add(user, job)
                    self._tell_places()
                    self._wake.notify_all()
        except PromptError as error:
            self.metrics.requests.labels("refused").inc()
            _logger.info("refused: %s", type(error).__name__)
            raise
        if late:
            job.cancel()
            self._count(job, "stopped")
            job.end("stopped")
        return job

    def cancel(self, session: str, arrival: float | None = None) -> int:
        """Stop what a browser tab asked for; returns how many requests that were.

        Args:
            arrival: when the wish came in, by default now. Requests that came in before and are still on their way to
                `submit` are stopped there.
        """
        with self._wake:
            wished = time.monotonic() if arrival is None else arrival
            self._cancelled[session] = max(wished, self._cancelled.pop(session, wished))
            while len(self._cancelled) > _MAX_CANCELLED:
                del self._cancelled[next(iter(self._cancelled))]
            mine = [job for job in self._alive() if job.session == session]
        for job in mine:
            self.stop(job)
        return len(mine)

    def stop(self, job: Job) -> None:
        """Stop a request: one that waits leaves the queue at once, one that is drawn ends after its step."""
        job.cancel()
        with self._wake:
            waited = self._line.remove(job)
            self._tell_places()
        if waited:
            self._count(job, "stopped")
            job.end("stopped")

    def _alive(self) -> list[Job]:
        return [job for job in [self._current, *self._line.in_order()] if job is not None]

    def edges(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """What a ControlNet will follow, as soon as nothing is drawn."""
        with self._pipeline:
            return self.artist.edges(image, height, width)

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def is_drawing(self) -> bool:
        return self._current is not None

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self.metrics.drawing.set(1)
            outcome, message = "failed", _FAULT
            try:
                outcome, message = self._draw(job)
                self._count(job, outcome)
            except Exception:  # such as a log that cannot be written; there is no other worker
                traceback.print_exc()
            with self._wake:
                self._current = None
            self.metrics.drawing.set(0)
            job.end(outcome, message)

    def _next(self) -> Job | None:
        """Wait for a job; None = closed."""
        with self._wake:
            while True:
                job_or_none = self._line.pop()
                if job_or_none is not None:
                    self._current = job_or_none
                    self._tell_places()
                    return job_or_none
                if self._closed:
                    return None
                self._wake.wait()

    def _draw(self, job: Job) -> tuple[str, str]:
        """Outcome, and what the user is told of a failure."""
        try:
            with self._pipeline:
                self.artist.draw(job)
            return "done", ""
        except Stopped:
            return "stopped", ""
        except PixArtError as error:
            return "failed", str(error)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return "failed", "the card has too little memory for this; ask for a smaller picture"
        except Exception:
            _logger.exception("a picture could not be drawn; the pipeline is loaded again")
            self._rebuild()
            return "failed", _FAULT

    def _rebuild(self) -> None:
        try:
            self.artist = self._build()
        except Exception:
            _logger.exception("the pipeline cannot be loaded again; /healthz says so")
            self.healthy = False

    def _tell_places(self) -> None:
        for place, job in enumerate(self._line.in_order(), start=1):
            job.tell(Progress("waiting", place=place, pictures=job.asked.pictures))

    def _count(self, job: Job, outcome: str) -> None:
        seconds = time.monotonic() - job.since
        self.metrics.requests.labels(outcome).inc()
        self.metrics.pictures.inc(len(job.paths))
        self.metrics.seconds.observe(seconds)
        asked = job.asked
        prompt = repr(asked.prompt) if self.settings.log_prompts else f"{len(asked.prompt)} characters"
        _logger.info(
            "%s in %.1f s: %d of %d pictures, %dx%d px, %s, %d steps, prompt: %s",
            outcome,
            seconds,
            len(job.paths),
            asked.pictures,
            asked.width,
            asked.height,
            asked.solver,
            asked.steps,
            prompt,
        )

    def note(self, text: str) -> None:
        """Remember a notice of the pipeline for the page of the current job."""
        if self._current is not None:
            self._current.notices.append(text)


class _Notices(logging.Handler):
    """What the pipeline says while it draws is for the user's page: it may quote the prompt, so no log gets it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(logging.INFO)
        self._engine = engine

    def emit(self, record: logging.LogRecord) -> None:
        self._engine.note(record.getMessage())
