"""A run's health: skipped steps and when they end it, spikes, slow processes, memory. Facts come from `verdict`."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator

import torch

from diffusion.config import TrainConfig
from diffusion.errors import DeviceMemoryError, NumericalError
from diffusion.ranks import Ranks
from diffusion.training.replay import StepRecorder
from diffusion.training.run_log import LOGGER
from diffusion.training.verdict import StepFacts, Verdict

_RECENT_STEPS, _MAX_SKIPPED_RECENTLY = 1000, 10  # 1 % of 1000 steps
_STRAGGLER_STEPS, _STRAGGLER_RATIO = 50, 1.5


class Health:
    """Watches the verdicts of a run; all processes see the same numbers and decide alike.

    Args:
        recorder: writes down what a skipped step needs to be run again.
        is_scaled: under loss scaling a gradient that overflows is how the scale is found: such steps are not recorded
            and count only in a row.
    """

    def __init__(self, config: TrainConfig, recorder: StepRecorder, *, is_scaled: bool) -> None:
        self._settings, self._recorder, self._is_scaled = config.health, recorder, is_scaled
        self._in_a_row, self._is_main = 0, recorder.ranks.is_main
        self._skipped: deque[int] = deque()
        z = config.health.spike_z
        self._monitors = {"loss": SpikeMonitor(z), "gradient norm": SpikeMonitor(z)} if z is not None else {}

    def observe(self, verdict: Verdict) -> None:
        """Take note of a step.

        Raises:
            NumericalError: too many steps were skipped.
        """
        facts = verdict.read()
        if facts.skipped:
            self._note_skip(verdict.step, facts)
            return
        self._in_a_row = 0
        for name, value in (("loss", facts.loss), ("gradient norm", facts.grad_norm)):
            z = self._monitors[name].add(value) if name in self._monitors else None
            if z is not None and self._is_main:
                LOGGER.warning("step %d  the %s %.4g is a spike: robust z-score %.1f", verdict.step, name, value, z)

    def _note_skip(self, step: int, facts: StepFacts) -> None:
        self._in_a_row += 1
        if self._is_scaled and math.isfinite(facts.loss):
            if self._is_main:
                LOGGER.info("step %d skipped: the gradients overflowed fp16; the loss scale is halved", step)
            path = None
        else:
            self._skipped.append(step)
            path = self._recorder.record(step, facts)
            if self._is_main:
                where = [
                    f"{name} of rank {', '.join(map(str, ranks))}"
                    for name, ranks in (("loss", facts.bad_losses), ("gradient", facts.bad_norms))
                    if ranks
                ]
                LOGGER.warning(
                    "step %d skipped on all processes, not finite: %s; see `python train_scripts/train.py --replay %s`",
                    step, " and ".join(where), path,
                )  # fmt: skip
        while self._skipped and self._skipped[0] <= step - _RECENT_STEPS:
            self._skipped.popleft()
        if self._in_a_row >= self._settings.max_skipped_in_a_row or len(self._skipped) > _MAX_SKIPPED_RECENTLY:
            many = f"{self._in_a_row} steps in a row"
            if self._in_a_row < self._settings.max_skipped_in_a_row:
                many = f"{len(self._skipped)} of the last {_RECENT_STEPS} steps"
            raise NumericalError(
                f"{many} had a loss or gradient that is not finite (last: step {step}); the last save is kept: lower "
                f"optimizer.lr, check the features, or see --replay {path or self._recorder.folder}"
            )


class SpikeMonitor:
    """Robust z-score of the logarithm of a positive number among the values before it: (x - median) / (1.4826 MAD).

    A spike is reported when it begins, and again only after the value has come down; it does not enter the history.
    """

    def __init__(self, threshold: float, *, history: int = 200, least: int = 20) -> None:
        self._threshold, self._least = threshold, least
        self._values: deque[float] = deque(maxlen=history)
        self._is_high = False

    def add(self, value: float) -> float | None:
        """The z-score if a spike begins here, else None."""
        log = math.log(max(value, 1e-30))
        z = 0.0
        if len(self._values) >= self._least:
            median = statistics.median(self._values)
            spread = 1.4826 * statistics.median(abs(other - median) for other in self._values)
            z = (log - median) / max(spread, 0.01)  # a flat history shall not make a change of 1 % a spike
        was_high, self._is_high = self._is_high, z > self._threshold
        if self._is_high and not was_high:
            return z
        # Two in a row are a new level, which the history has to learn.
        self._values.append(log)
        return None


class Stragglers:
    """Names processes that are slow by themselves: data wait and forward pass, which (in DDP) nobody else delays."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._seconds, self._steps = ranks, 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._named: set[int] = set()

    @contextlib.contextmanager
    def measure(self, waited_s: float) -> Iterator[None]:
        """Around a forward pass that came after `waited_s` of waiting for data."""
        self._seconds += waited_s
        if self._ranks.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            since = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - since

    def end_step(self) -> None:
        """Compare the processes every 50 steps."""
        self._steps += 1
        if self._steps < _STRAGGLER_STEPS:
            return
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._steps = 0.0, 0
        self._events.clear()
        if self._ranks.world_size > 1:
            self._compare(self._ranks.gather(seconds / _STRAGGLER_STEPS))

    def _compare(self, seconds: list[float]) -> None:
        slow = slow_ranks(seconds)
        for rank in slow - self._named:
            if self._ranks.is_main:
                LOGGER.warning(
                    "rank %d is slow: %.0f ms a step for data and forward pass over %d steps, the median is %.0f ms",
                    rank, 1000 * seconds[rank], _STRAGGLER_STEPS, 1000 * statistics.median_low(seconds),
                )  # fmt: skip
        self._named = slow


def slow_ranks(seconds: list[float]) -> set[int]:
    """Ranks that take more than 1.5 times the (lower) median."""
    median = statistics.median_low(seconds)
    return {rank for rank, own in enumerate(seconds) if own > _STRAGGLER_RATIO * median}


@contextlib.contextmanager
def explained_out_of_memory(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Turn torch's error into one that says what the run needed and what saves most; nothing is tried again.

    Raises:
        DeviceMemoryError: instead of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak, total = "", ""
        if ranks.device.type == "cuda":
            peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            total = f" of {torch.cuda.get_device_properties(ranks.device).total_memory / 2**30:.1f} GiB"
        raise DeviceMemoryError(
            f"out of memory on rank {ranks.rank} with train_batch_size={config.train_batch_size} at "
            f"{config.image_size} px{peak}{total}; cheapest first: {'; '.join(memory_switches(config, ranks)[:3])}"
        ) from error


def memory_switches(config: TrainConfig, ranks: Ranks) -> list[str]:
    """What this run can still switch on to use less memory, by what it costs, cheapest first."""
    batch, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    checkpoints, selective = config.grad_checkpointing, config.grad_checkpointing_args.policy == "selective"
    every = config.grad_checkpointing_args.every
    switches = []
    if config.mixed_precision == "no":
        switches.append("mixed_precision='bf16'")
    if not checkpoints and not config.compile:
        switches.append("grad_checkpointing=True grad_checkpointing_args.policy='selective'")
    if config.strategy == "ddp" and ranks.world_size > 1:
        switches.append("parallel.strategy='full_shard'")
    if not checkpoints or selective or every > 1:
        switches.append("grad_checkpointing=True for all blocks (about a third slower)")
    if batch % 2 == 0:
        switches.append(f"train_batch_size={batch // 2} gradient_accumulation_steps={2 * accumulation}")
    switches += ["ema_rate=None", "a smaller image_size"]
    return switches
