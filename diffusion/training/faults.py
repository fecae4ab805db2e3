"""Faults on purpose, so that what must survive them can be shown to. Inert unless FAULT is set.

    FAULT="nan@step=5,rank=1"            the loss of a step is NaN (also micro=2: of that micro-batch alone)
    FAULT="nan_grad@step=5,rank=1"       one number of the gradient of that process is NaN, after the exchange
    FAULT="hang@step=5,rank=1"           the process sleeps for ever
    FAULT="kill@step=17,rank=1"          SIGKILL;  exit@step=..: leaves with code 9;  raise@step=..: an exception
    FAULT="slow@ms=50,rank=1"            every forward pass takes longer
    FAULT="flip@step=3,rank=1"           a weight changes after the step;  oom@step=..: out of memory

Several are separated by ";". Without `step` a fault strikes at every step, without `rank` on every process. Processes
that torchrun has restarted have no faults.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.errors import ConfigError, did_you_mean
from diffusion.training.sharding import local

VARIABLE = "FAULT"
KINDS = ("nan", "nan_grad", "hang", "kill", "exit", "raise", "slow", "flip", "oom")


@dataclass(frozen=True)
class Fault:
    """One fault: what, and the numbers that say when and where."""

    kind: str
    numbers: Mapping[str, int]

    def strikes(self, **now: int) -> bool:
        """Whether all numbers that the fault and the moment both have are equal."""
        return all(self.numbers[name] == value for name, value in now.items() if name in self.numbers)


def parse_faults(text: str) -> list[Fault]:
    """Faults of the variable's text.

    Raises:
        ConfigError: an unknown kind, or a number that is none.
    """
    faults = []
    for part in filter(None, text.split(";")):
        kind, _, details = part.strip().partition("@")
        if kind not in KINDS:
            raise ConfigError(f"{VARIABLE}={text!r}: unknown fault {kind!r}; {did_you_mean(kind, KINDS)}")
        pairs = [pair.partition("=") for pair in filter(None, details.split(","))]
        if not all(value.isdigit() for _, _, value in pairs):
            raise ConfigError(f"{VARIABLE}={text!r}: {details!r} must be NAME=NUMBER pairs, e.g. step=5,rank=1")
        faults.append(Fault(kind, {name: int(value) for name, _, value in pairs}))
    return faults


class Faults:
    """The faults of this process."""

    def __init__(self, rank: int, environment: Mapping[str, str] = os.environ) -> None:
        text = environment.get(VARIABLE, "")
        again = int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
        self._faults = [] if again else [fault for fault in parse_faults(text) if fault.strikes(rank=rank)]
        if self._faults:
            print(f"*** FAULT INJECTION on rank {rank}: {text} ***", file=sys.stderr, flush=True)

    def _now(self, kind: str, **now: int) -> Fault | None:
        return next((fault for fault in self._faults if fault.kind == kind and fault.strikes(**now)), None)

    def before_forward(self, step: int) -> None:
        """Hang, die, fail or be slow, if that is due in step `step` (1 = the first)."""
        if not self._faults:
            return
        if self._now("hang", step=step):
            time.sleep(1e6)
        if self._now("kill", step=step):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._now("exit", step=step):
            os._exit(9)
        if self._now("raise", step=step):
            raise RuntimeError(f"injected fault at step {step}")
        if self._now("oom", step=step):
            raise torch.OutOfMemoryError("injected fault")
        slow = self._now("slow", step=step)
        if slow is not None:
            time.sleep(slow.numbers.get("ms", 50) / 1000)

    def on_loss(self, loss: Tensor, step: int, micro: int) -> Tensor:
        """The loss, or NaN; `micro` 0 = the first micro-batch."""
        return loss * float("nan") if self._now("nan", step=step, micro=micro) else loss

    def on_gradients(self, parameters: Iterable[Tensor], step: int) -> None:
        """Spoil one gradient of this process, after the exchange."""
        if self._now("nan_grad", step=step):
            gradients = (local(parameter.grad) for parameter in parameters if parameter.grad is not None)
            next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = float("nan")

    @torch.no_grad()
    def after_step(self, network: nn.Module, step: int) -> None:
        """Change a weight of this process."""
        if self._now("flip", step=step):
            list(map(local, network.parameters()))[-1].view(-1)[:1].add_(1e-3)
