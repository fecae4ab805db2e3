"""Runs of the trainer on synthetic features, timed between two steps; shared by benchmarks of training."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from timing import finish

from diffusion.config import TrainConfig
from diffusion.features import FeatureRow, FeatureStoreWriter
from diffusion.ranks import Ranks
from diffusion.training import Reporting, Trainer, denoising_objective

# Small enough for two CPU cores: width 32, two blocks, captions of 16 channels.
TINY = {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 16}


def write_features(root: Path, rows: int, image_size: int, channels: int) -> None:
    """A store of random features at one size; captions have 1 to 120 tokens, 60 on average."""
    rng, side = random.Random(0), image_size // 8
    torch.manual_seed(0)
    noise, size = torch.randn(120, channels).bfloat16(), (image_size, image_size)
    writer = FeatureStoreWriter(root, {}, torch.zeros(1, channels))
    for number in range(rows):
        latents, length = torch.randn(4, side, side), max(1, round(120 * rng.betavariate(2, 2)))
        box = (0, 0, image_size, image_size)
        writer.add(FeatureRow(f"{number}", size, size, box, latents, latents.abs(), ["c"], [noise[:length]]))
    writer.close()


def make_config(store: Path, image_size: int, batch_size: int, steps: int, **options: Any) -> TrainConfig:
    """XL/2 as it is trained: bf16 (fp32 on a CPU), AdamW, clipping, EMA; nothing but the last step is saved."""
    values = {
        "data": {"type": "Store", "root": str(store)},
        "model": "PixArt_XL_2",
        "image_size": image_size,
        "lewei_scale": image_size / 512,
        "train_batch_size": batch_size,
        "null_caption": "t5_empty",
        "max_steps": steps,
        "num_epochs": steps,
        "num_workers": 4,
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
        "gradient_clip": 0.01,
        "optimizer": {"type": "AdamW", "lr": 1e-4, "eps": 1e-10},
        "save_model_epochs": None,
        "save_model_steps": None,
        "log_interval": 20,
    }
    return TrainConfig.model_validate({**values, **options})


class TimedTrainer(Trainer):
    """Times steps after a warm-up, and ends without a save unless one is asked for.

    warm_up, profiled: steps before and after the timed ones; the profiled ones say how long processes communicate.
    saves: "no"; "last": those of the config, the last step at least; "timed": each is waited for, and timed.
    """

    warm_up, profiled, saves = 5, 0, "no"
    communication: dict[str, float] | None = None

    def _train_step(self, *arguments: Any) -> Any:
        done, last_timed = self.state.step - self.first_step, self.total_steps - self.first_step - self.profiled
        if done == self.warm_up:
            self._begin_timing()
        if done == last_timed and self.profiled:
            activity = torch.profiler.ProfilerActivity
            here = activity.CUDA if self.ranks.device.type == "cuda" else activity.CPU
            self._profiler = torch.profiler.profile(activities=[here], acc_events=True)
            self._profiler.start()
        if self.warm_up <= done < last_timed:
            self._marks.append(self._mark())
        verdict = super()._train_step(*arguments)
        if done == 0:
            finish(self.ranks.device)
            self.stepped_at = time.perf_counter()
        if done + 1 == last_timed:
            self._marks.append(self._mark())
            finish(self.ranks.device)
            self.last_loss = verdict.loss.item()
        if self.profiled and self.state.step == self.total_steps:
            finish(self.ranks.device)
            self._profiler.stop()
            self.communication = communication(self._profiler.events())
        return verdict

    def _begin_timing(self) -> None:
        finish(self.ranks.device)
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._marks: list[Any] = []

    def _mark(self) -> Any:
        """A moment on the device."""
        if self.ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds_of_steps(self) -> list[float]:
        """Of each timed step, as the device saw it."""
        pairs = list(zip(self._marks, self._marks[1:]))
        if self.ranks.device.type == "cuda":
            return [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return [end - begin for begin, end in pairs]

    @property
    def seconds_a_step(self) -> float:
        """Median: a step in which the allocator or a library sets itself up is no rate."""
        return statistics.median(self.seconds_of_steps)

    @property
    def spread(self) -> float:
        """Standard deviation of the timed steps over their mean."""
        seconds = self.seconds_of_steps
        return statistics.pstdev(seconds) / statistics.mean(seconds)

    @property
    def peak_gib(self) -> float | None:
        """Most memory that tensors took on this process's card in the timed steps; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.ranks.device.type == "cuda" else None

    # ---- saves ----

    def _build_saver(self) -> Any:
        saver = super()._build_saver()
        self.waits_s, self.writes_s = [], []
        if self.saves == "no":
            saver.is_due = lambda: False  # type: ignore[method-assign]
            saver.reserve = lambda: None  # type: ignore[method-assign]  # page-locks memory while steps are timed
        return saver

    def _save(self, saver: Any, request: Any) -> None:
        finish(self.ranks.device)
        begin = time.perf_counter()
        super()._save(saver, request)
        self.waits_s.append(time.perf_counter() - begin)
        if self.saves == "timed":
            saver.settle()
            self.writes_s.append(time.perf_counter() - begin)
            self.ranks.barrier()

    def _restore(self, folder: Path) -> None:
        begin = time.perf_counter()
        super()._restore(folder)
        finish(self.ranks.device)
        self.restore_s = time.perf_counter() - begin


def run_timed(
    config: TrainConfig, work_dir: Path, ranks: Ranks, *, warm_up: int = 5, profiled: int = 0, saves: str = "no"
) -> TimedTrainer:
    """Train to the end in a folder of its own, or on from its last checkpoint."""
    trainer = TimedTrainer(
        config,
        denoising_objective,
        work_dir,
        resume_from="latest",
        reporting=Reporting(tensorboard=False),
        ranks=ranks,
    )
    trainer.warm_up, trainer.profiled, trainer.saves = warm_up, profiled, saves
    trainer.fit()
    return trainer


def communication(events: Any) -> dict[str, float]:
    """Share of profiled time in which NCCL or copies between GPUs ran (on a CPU, gloo's operations), and ran alone.

    The first counts waiting for slower processes too; only the second delays a step.
    """
    talking: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    on_card = any(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        name = event.name.lower()
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if on_card and (not is_kernel or getattr(event, "is_user_annotation", False)):
            continue
        if any(part in name for part in ("nccl", "ptop", "symmetric_memory")) or name.startswith("gloo:"):
            talking.append(span)
        elif on_card or name.startswith("aten::"):
            others.append(span)
    if not talking:
        return {"communication_share": 0.0, "exposed_communication_share": 0.0}
    everything = talking + others
    whole = max(end for _, end in everything) - min(begin for begin, _ in everything)
    alone = covered(everything) - covered(others)
    return {
        "communication_share": round(covered(talking) / whole, 4),
        "exposed_communication_share": round(alone / whole, 4),
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
