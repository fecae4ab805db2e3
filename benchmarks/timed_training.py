"""Runs of the trainer on synthetic features, timed between two steps; shared by benchmarks of training."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch

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
    """Times the steps after a warm-up, and ends without a save unless one is asked for."""

    warm_up, saves = 5, False

    def _train_step(self, *arguments: Any) -> Any:
        if self.state.step == self.first_step + self.warm_up:
            self._synchronise()
            if self.ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.timed_from = time.perf_counter()
        verdict = super()._train_step(*arguments)
        if self.state.step == self.total_steps:
            self._synchronise()
            steps = self.total_steps - self.first_step - self.warm_up
            self.seconds_a_step = (time.perf_counter() - self.timed_from) / steps
            self.last_loss = verdict.loss.item()
        return verdict

    def _synchronise(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _build_saver(self) -> Any:
        saver = super()._build_saver()
        if not self.saves:
            saver.is_due = lambda: False  # type: ignore[method-assign]
        return saver

    @property
    def peak_gib(self) -> float | None:
        """Most memory that tensors took on this process's card in the timed steps; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.ranks.device.type == "cuda" else None


def run_timed(
    config: TrainConfig, work_dir: Path, ranks: Ranks, *, warm_up: int = 5, saves: bool = False
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
    trainer.warm_up, trainer.saves = warm_up, saves
    trainer.fit()
    return trainer
