"""What a run writes while it trains: log lines, metrics.jsonl and TensorBoard events. Main rank only."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from diffusion.files import write_atomically

LOGGER = logging.getLogger("pixart")


def configure_logging(work_dir: Path | None, *, is_main: bool) -> None:
    """Lines to stdout and to WORK/train_log.log (appended on resume); other ranks say warnings alone."""
    close_log()
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if is_main else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if is_main and work_dir is not None:
        handlers.append(logging.FileHandler(work_dir / "train_log.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        LOGGER.addHandler(handler)


def close_log() -> None:
    """Give back WORK/train_log.log: what this process logs after its run is not the run's."""
    for handler in LOGGER.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            LOGGER.removeHandler(handler)
            handler.close()


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class MetricsLog:
    """metrics.jsonl (one object a logged step) and TensorBoard events, in step.

    Args:
        work_dir: of the run.
        resumed_step: lines of later steps are dropped, as work that was lost; -1 drops all.
        tensorboard: also write events to WORK/logs/<project_name>.
    """

    def __init__(self, work_dir: Path, resumed_step: int, *, tensorboard: bool, project_name: str) -> None:
        self.path = work_dir / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= resumed_step]
            write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(work_dir / "logs" / project_name), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record scalar values of a step."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Any) -> None:
        """Record a PIL picture in TensorBoard."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        """Bring everything to the disk; called before a save, so that a resumed run lacks no step."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _step_of(line: str) -> float:
    """Step of a metrics line; a line cut off by a crash counts as later than everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
