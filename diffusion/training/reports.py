"""What a run says of itself: its size, its first batch, log lines, validation."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion.config import TrainConfig
from diffusion.data import AspectRatioBatchSampler
from diffusion.objectives import Objective
from diffusion.ranks import Ranks
from diffusion.training.first_batch import first_batch_sheet
from diffusion.training.run_log import LOGGER, MetricsLog, format_duration
from diffusion.training.state import RunState, evaluated_network
from diffusion.training.validation import PromptGrid, ValidationLoss
from diffusion.training.window import Window

GRID = "grid.json"  # beside the grids: how they were drawn


@dataclass
class Reporting:
    """Names under which a run reports: TensorBoard on or off, its folder, and the tag of the loss."""

    tensorboard: bool = True
    project_name: str = "text2image-fine-tune"
    loss_name: str = "loss"


def described(network: Any) -> str:
    """A network by its sizes: a name of a config would not be that of a model that was opened from files."""
    shape = getattr(getattr(network, "module", network), "config", None)
    return f"{shape.depth} blocks of width {shape.hidden_size}" if shape is not None else type(network).__name__


@dataclass
class Reports:
    """Held by every rank, since validation is common work; the main one writes.

    Args:
        total_steps: of the run.
        is_resumed: lines of metrics up to the state's step are kept.
    """

    config: TrainConfig
    reporting: Reporting
    ranks: Ranks
    state: RunState
    objective: Objective
    dataset: Any
    sampler: AspectRatioBatchSampler
    work_dir: Path
    total_steps: int
    is_resumed: bool
    validation_loss: ValidationLoss | None = field(default=None, init=False)
    _grid: PromptGrid | None = field(default=None, init=False)
    _metrics: MetricsLog | None = field(default=None, init=False)

    def begin(self) -> None:
        """Say what is about to be trained on what, and open the logs."""
        self._announce()
        if self.ranks.is_main:
            self._metrics = MetricsLog(
                self.work_dir,
                self.state.step if self.is_resumed else -1,
                tensorboard=self.reporting.tensorboard,
                project_name=self.reporting.project_name,
            )
        self._show_first_batch()
        self._prepare_validation()

    def start_clock(self) -> None:
        """Steps are timed from here on."""
        self._since, self._first_step = time.perf_counter(), self.state.step

    def flush(self) -> None:
        """Whatever was logged is on the disk."""
        if self._metrics is not None:
            self._metrics.flush()

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def log(self, window: Window) -> None:
        """Means and rates since the last line; the window begins anew."""
        self.state.settle()
        loss, norm = window.means().tolist()  # of all processes; NaN if every step was skipped
        seconds, steps = window.seconds(), window.steps
        step, lr = self.state.step, self.state.optimizer.param_groups[0]["lr"]
        remaining = (self.total_steps - step) * (time.perf_counter() - self._since) / (step - self._first_step)
        values = {
            self.reporting.loss_name: loss,
            "grad_norm": norm,
            "lr": lr,
            "images_per_s": steps * self.sampler.global_batch / seconds,
            "data_wait_share": window.waited_s / seconds,
            "epoch": (step - 1) // self.sampler.steps_per_epoch,
            "remaining_s": remaining,
        }
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.state.skipped_steps:
            values["skipped_steps"] = self.state.skipped_steps
        if self.ranks.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        window.restart()
        if self._metrics is not None:
            self._metrics.write(step, values)
            LOGGER.info(
                "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.1f images/s  data wait %.1f%%  ETA %s",
                step, self.total_steps, loss, norm, lr, values["images_per_s"], 100 * values["data_wait_share"],
                format_duration(remaining),
            )  # fmt: skip

    def validate(self) -> None:
        """Loss on every rank, grid on the main one, both with the averaged weights if there are any.

        Raises:
            PixArtError, OSError: the grid cannot be drawn or written; on all ranks alike.
        """
        if self.config.validation_every_steps is None:
            return
        with evaluated_network(self.state) as network:
            if self.validation_loss is not None:
                loss = self.validation_loss(network)
                if self._metrics is not None:
                    self._metrics.write(self.state.step, {"validation_loss": loss})
                    LOGGER.info("step %d  validation loss %.4f", self.state.step, loss)
            self.ranks.on_main(lambda: self._draw_grid(network))

    def _draw_grid(self, network: Any) -> None:
        if self._grid is None:
            return
        assert self._metrics is not None
        step = self.state.step
        picture = self._grid.draw(network)
        path = self.work_dir / "validation" / f"step_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        (path.parent / GRID).write_text(json.dumps(self._grid.drawn, indent=1, ensure_ascii=False) + "\n")
        self._metrics.picture(step, "validation", picture)
        LOGGER.info("step %d  validation grid: %s", step, path)

    def _announce(self) -> None:
        config, ranks, sampler = self.config, self.ranks, self.sampler
        parameters = sum(p.numel() for p in self.state.network.parameters())
        LOGGER.info(
            "%s, %.1f M parameters, on %d x %s, %s", described(self.state.network), parameters / 1e6, ranks.world_size,
            torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu", config.mixed_precision,
        )  # fmt: skip
        LOGGER.info(
            "%d samples; global batch %d = %d x %d processes x %d accumulated; %d steps an epoch, %d in all",
            len(self.dataset), sampler.global_batch, config.train_batch_size, ranks.world_size,
            config.gradient_accumulation_steps, sampler.steps_per_epoch, self.total_steps,
        )  # fmt: skip

    def _show_first_batch(self) -> None:
        if self._metrics is None:
            return
        sheet = first_batch_sheet(self.config, self.dataset, self.sampler, self.ranks.device)
        if sheet is not None:
            path = self.work_dir / "first_batch.png"
            sheet.save(path)
            self._metrics.picture(self.state.step, "first_batch", sheet)
            LOGGER.info("step %d  first batch, decoded from its latents: %s", self.state.step, path)

    def _prepare_validation(self) -> None:
        config = self.config
        if config.validation_every_steps is None:
            return
        if config.data.type == "Store" and config.validation.num_samples > 0:
            self.validation_loss = ValidationLoss(config, self.objective, self.ranks)  # type: ignore[arg-type]
        if self.ranks.is_main and (config.validation.prompts or config.validation.prompt_file):
            self._grid = self.state.family.build_grid(config, self.ranks.device, self.dataset)
