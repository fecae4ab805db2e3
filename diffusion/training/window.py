"""What a run has measured since its last log line; part of its state, so that resuming leaves no trace in the lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.training.verdict import Verdict


class Window:
    """Sums between two log lines; values stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        self.steps, self.waited_s, self._paused_s = 0, 0.0, 0.0
        self.begin()

    def begin(self) -> None:
        """Training starts now; what was before does not count into the rates."""
        self._steps_here = 0  # without those of an earlier process, whose time is not known
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within (validation, a save) does not count into the rates."""
        begin = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - begin

    def add(self, verdict: Verdict) -> None:
        """Count a step; a skipped one has no loss."""
        values = torch.stack([verdict.loss, verdict.norm, torch.ones_like(verdict.loss)]).double()
        self._sums += torch.where(verdict.skip > 0, torch.zeros_like(values), values)
        self.steps += 1
        self._steps_here += 1

    def means(self) -> Tensor:
        """(2,) float64, loss and gradient norm over the steps that were not skipped; NaN without any."""
        return self._sums[:2] / self._sums[2]

    def seconds(self) -> float:
        """Training time of all steps of the window; of those before a restart, as long as the others took."""
        measured = time.perf_counter() - self._since - self._paused_s
        return measured * self.steps / max(self._steps_here, 1)

    def state(self) -> dict[str, Any]:
        """The open window as JSON values; a verdict is that of all ranks, so each has the same sums."""
        return {"steps": self.steps, "sums": self._sums.tolist()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on with a window that was saved."""
        self.restart()
        if state is None:
            return
        self._sums = torch.tensor(state["sums"], dtype=torch.float64, device=self._device)
        self.steps = state["steps"]
