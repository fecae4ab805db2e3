"""What a run has measured since its last log line; part of its state, so that resuming leaves no trace in the lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.ranks import Ranks


class Window:
    """Sums between two log lines; values stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._device)
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

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._sums += torch.stack([loss.double(), norm.double()])
        self.steps += 1
        self._steps_here += 1

    def means(self) -> Tensor:
        """Mean loss and gradient norm on this rank, (2,) float64."""
        return self._sums / self.steps

    def seconds(self) -> float:
        """Training time of all steps of the window; of those before a restart, as long as the others took."""
        measured = time.perf_counter() - self._since - self._paused_s
        return measured * self.steps / max(self._steps_here, 1)

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """The open window as JSON values: its steps and the sums of every rank. All ranks call it."""
        return {"steps": self.steps, "sums": ranks.gather(self._sums.tolist())}

    def restore(self, state: Mapping[str, Any] | None, ranks: Ranks) -> None:
        """Go on with a window that was saved; on another number of ranks each gets the mean of all."""
        self.restart()
        if state is None:
            return
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        mine = sums[ranks.rank] if len(sums) == ranks.world_size else sums.mean(dim=0)
        self._sums, self.steps = mine.to(self._device), state["steps"]
