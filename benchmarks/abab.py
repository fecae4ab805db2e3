"""Arms of one comparison in one process: each finds its best setting alone, then all are timed in turns, A B C A B C.

Turns share what a card does over minutes (clock, heat, neighbours), so ratios within a run hold where figures of two
runs would not.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timing import finish, timed
from torch import Tensor

from diffusion.errors import DeviceMemoryError


@dataclass(frozen=True)
class Setting:
    """What an arm may choose for itself: pictures a call, and how it is compiled ("" = not at all)."""

    batch: int
    compile: str = ""

    def __str__(self) -> str:
        return f"batch {self.batch}" + (f", compile {self.compile}" if self.compile else "")


class Arm(Protocol):
    """One way to do the row's work."""

    name: str
    settings: Sequence[Setting]
    owner: object
    calls_to_wake: int  # untimed ones that bring it back to speed: caches fill, a CUDA graph is recorded anew

    def build(self, setting: Setting) -> Callable[[], Any]:
        """A call that does the work for `setting.batch` pictures."""

    def rest(self) -> None:
        """After a turn: give up what the next one makes anew, as gradients and CUDA graphs with their memory."""

    def state(self) -> Iterable[Tensor]:
        """Tensors that may leave the device while the arm rests."""


@dataclass
class Result:
    """An arm's figures: seconds a call in each window, and what its search found (pictures/s, or why not)."""

    name: str
    setting: Setting
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    warm_up_s: float = 0.0
    tried: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


class Garage:
    """Keeps the state of waiting arms in host memory; the tensors, and views among them, stay the same objects.

    Arms that share their state say so by a common `owner`.
    """

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = {}

    def park(self, arm: Arm) -> None:
        if id(arm.owner) in self.kept:
            return
        kept = self.kept[id(arm.owner)] = []
        for storage in storages(arm):
            pinned = storage.is_cuda  # from torch's cache of pinned memory, which the next turn finds again
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()
            kept.append((storage, copy.copy_(storage)))
            storage.resize_(0)

    def wake(self, arm: Arm) -> None:
        for storage, copy in self.kept.pop(id(arm.owner), []):
            storage.resize_(copy.nbytes())
            storage.copy_(copy)


def storages(arm: Arm) -> list[torch.UntypedStorage]:
    """Of an arm's state, each once."""
    return [*{t.untyped_storage().data_ptr(): t.untyped_storage() for t in arm.state()}.values()]


def tidy(device: Any) -> None:
    """Free what no arm holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def choose(arm: Arm, device: Any, *, warm_up: int, seconds: float, until: float) -> Result:
    """Time every setting of an arm for a moment and keep the one with the most pictures a second.

    Args:
        until: no setting is begun after this reading of `time.monotonic`, once one has been timed.
    Raises:
        DeviceMemoryError: no setting fits into memory.
    """
    tried: dict[str, Any] = {}
    best: tuple[float, Setting] | None = None
    for setting in arm.settings:
        if len(arm.settings) == 1:
            best = (0.0, setting)
            break
        if best is not None and time.monotonic() > until:
            tried[str(setting)] = "not tried: out of time"
            continue
        try:
            call = arm.build(setting)
            for _ in range(warm_up):
                call()
            rate = setting.batch / window(call, device, calls_for(call, device, seconds))
        except (torch.OutOfMemoryError, DeviceMemoryError):
            tried[str(setting)] = "out of memory"
            call = None
            tidy(device)
            continue
        tried[str(setting)] = round(rate, 3)
        print(f"{arm.name}, {setting}: {rate:.3f} pictures/s", flush=True)
        best = max(best or (0.0, setting), (rate, setting), key=lambda pair: pair[0])
        call = None
        tidy(device)
    if best is None:
        raise DeviceMemoryError(f"{arm.name}: no setting fits into memory ({', '.join(tried)}); give smaller --batches")
    return Result(arm.name, best[1], tried=tried)


def calls_for(call: Callable[[], Any], device: Any, seconds: float) -> int:
    """Calls that fill a window of so many seconds."""
    return max(1, round(seconds / max(timed(device, call), 1e-4)))


def window(call: Callable[[], Any], device: Any, calls: int) -> float:
    """Seconds a call, over so many calls in a row."""

    def all_calls() -> None:
        for _ in range(calls):
            call()

    return timed(device, all_calls) / calls


def compare(
    arms: Sequence[Arm],
    device: Any,
    *,
    windows: int,
    warm_up: int,
    seconds: float,
    park: bool,
    search_s: float = float("inf"),
) -> list[Result]:
    """Best setting of each arm, then `windows` turns of all arms in order.

    Args:
        warm_up: calls before an arm is timed. seconds: least length of a window.
        park: keep the state of waiting arms in host memory, which takes seconds a turn; else all arms stay on the
            device, and the peak of each leaves out what the others hold.
        search_s: time for all searches; each arm has its share, and tries one setting at least.
    """
    began = time.monotonic()
    garage, results, calls, counts = Garage(), [], [], []
    held: dict[int, int] = {}  # bytes of resting arms, by owner
    if park:
        for arm in arms:
            garage.park(arm)
    for number, arm in enumerate(arms, start=1):
        garage.wake(arm)
        tidy(device)
        before = allocated(device)
        until = began + search_s * number / len(arms)
        result = choose(arm, device, warm_up=warm_up, seconds=seconds, until=until)
        call = arm.build(result.setting)
        times = max(warm_up, 1)
        result.warm_up_s = round(times * window(call, device, times), 2)
        counts.append(calls_for(call, device, seconds))
        results.append(result)
        calls.append(call)
        print(f"{arm.name}: {result.setting}, ready after {time.monotonic() - began:.0f} s", flush=True)
        arm.rest()
        tidy(device)
        if park:
            garage.park(arm)
        else:
            own = max(allocated(device) - before, sum(storage.nbytes() for storage in storages(arm)))
            held[id(arm.owner)] = max(own, held.get(id(arm.owner), 0))
    for _ in range(windows):
        for arm, result, call, count in zip(arms, results, calls, counts):
            garage.wake(arm)
            tidy(device)
            if device.type == "cuda":  # here: what a graph works in is allocated while it is recorded
                torch.cuda.reset_peak_memory_stats(device)
            for _ in range(arm.calls_to_wake):
                call()
            finish(device)
            result.seconds.append(window(call, device, count))
            others = sum(held.values()) - held.get(id(arm.owner), 0)
            result.peak_bytes = max(result.peak_bytes, allocated(device, peak=True) - others)
            arm.rest()
            if park:
                garage.park(arm)
        turn = ", ".join(f"{result.name} {1000 * result.seconds[-1]:.2f} ms" for result in results)
        print(f"turn {len(results[0].seconds)}, after {time.monotonic() - began:.0f} s: {turn}", flush=True)
    return results


def allocated(device: Any, *, peak: bool = False) -> int:
    """Bytes of tensors on the card, now or at most since the last reset; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
