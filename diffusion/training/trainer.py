"""The training loop, once for all families: load, accumulate, clip, step, average, log, validate, save."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.checkpoints.training_state import latest_checkpoint, remove_stale
from diffusion.config import TrainConfig
from diffusion.data import AspectRatioBatchSampler, EndlessBatches, build_loader
from diffusion.errors import ConfigError, NumericalError
from diffusion.files import FolderLock
from diffusion.models import PixArt
from diffusion.objectives import Objective
from diffusion.ranks import Ranks
from diffusion.training.building import build_network, build_training_data
from diffusion.training.first_batch import first_batch_sheet
from diffusion.training.optimization import WeightAverage, build_optimizer, global_norm, lr_factor, scaled_learning_rate
from diffusion.training.posthoc_snapshots import PosthocAverages
from diffusion.training.run_log import LOGGER, MetricsLog, configure_logging, format_duration
from diffusion.training.saving import Saver, falls_on
from diffusion.training.state import RunState, averaged_weights
from diffusion.training.validation import PromptGrid, ValidationLoss
from diffusion.training.work_dir import refuse_existing_run

_AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Reporting:
    """Names under which a run reports: TensorBoard on or off, its folder, and the tag of the loss."""

    tensorboard: bool = True
    project_name: str = "text2image-fine-tune"
    loss_name: str = "loss"


class Trainer:
    """One run: a config, an objective, a folder.

    Args:
        config: validated.
        make_objective: called with (config, dataset).
        work_dir: logs, metrics and checkpoints.
        resume_from: a checkpoint folder or "latest"; None starts anew.
        load_from: starting weights of a new run; overrides the config.
    Raises:
        PixArtError: anything the user can mend, before the first step.
    """

    def __init__(
        self,
        config: TrainConfig,
        make_objective: Callable[[TrainConfig, Any], Objective],
        work_dir: str | Path,
        *,
        resume_from: str | None = None,
        load_from: str | None = None,
        reporting: Reporting | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if config.use_fsdp:
            raise ConfigError("use_fsdp=True is not available yet; set it to False (DDP)")
        self.config, self.reporting = config, reporting or Reporting()
        self.ranks = ranks or Ranks()
        self.work_dir = Path(work_dir)
        self.checkpoints = self.work_dir / "checkpoints"
        resume_from = resume_from or config.resume_from.checkpoint
        self._open_work_dir(resume_from)
        self.dataset = build_training_data(config)
        self.objective = make_objective(config, self.dataset)
        self.sampler = self._build_sampler()
        torch.manual_seed(config.seed)  # of the initial weights; every later draw is keyed by its sample number
        self.resumed_from = self._find_checkpoint(resume_from)
        start = (load_from or config.load_from) if self.resumed_from is None else None
        network = build_network(config, start).to(self.ranks.device)
        self.state = self._build_state(network)
        if self.resumed_from is not None:
            self._restore(self.resumed_from)
        self.model = self._wrap(network)
        self.total_steps = self._total_steps()

    # ---- building ----

    def _open_work_dir(self, resume_from: str | None) -> None:
        if self.ranks.is_main:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(self.work_dir)
            if resume_from is None:
                refuse_existing_run(self.work_dir)
            remove_stale(self.checkpoints)
            (self.work_dir / "config.json").write_text(self.config.to_json())
        self.ranks.barrier()
        configure_logging(self.work_dir, is_main=self.ranks.is_main)

    def _find_checkpoint(self, resume_from: str | None) -> Path | None:
        """The folder to resume; every rank waits for the main rank's choice."""
        if resume_from is None:
            return None
        if resume_from != "latest":
            return Path(resume_from)
        found = self.ranks.broadcast(latest_checkpoint(self.checkpoints) if self.ranks.is_main else None)
        if found is None and self.ranks.is_main:
            LOGGER.info("no checkpoint in %s yet: starting at step 0", self.checkpoints)
        return found

    def _build_sampler(self) -> AspectRatioBatchSampler:
        config = self.config
        balance_by = config.data.balance_by
        return AspectRatioBatchSampler(
            self.dataset.buckets,
            batch_size=config.train_batch_size,
            world_size=self.ranks.world_size,
            rank=self.ranks.rank,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            last=config.last_batch,
            balance=self.dataset.attribute(balance_by) if balance_by else None,
            repeats=getattr(self.dataset, "repeats", None),
        )

    @property
    def global_batch(self) -> int:
        """Samples an optimiser step."""
        return self.config.train_batch_size * self.ranks.world_size * self.config.gradient_accumulation_steps

    def _build_state(self, network: Any) -> RunState:
        config = self.config
        use_scaler = config.mixed_precision == "fp16" and self.ranks.device.type == "cuda"
        posthoc = config.posthoc_ema if self.ranks.is_main else None
        return RunState(
            network=network,
            optimizer=build_optimizer(network, config, self.global_batch),
            scaler=torch.amp.GradScaler(self.ranks.device.type, enabled=use_scaler),
            average=WeightAverage(network, config.ema_rate) if config.ema_rate is not None else None,
            posthoc=PosthocAverages(network, posthoc.sigma_rels) if posthoc is not None else None,
        )

    def _restore(self, folder: Path) -> None:
        settings = self.config.resume_from
        content = self.state.restore(folder, load_ema=settings.load_ema, resume_optimizer=settings.resume_optimizer)
        samples = self.state.step * self.global_batch
        if content["samples_seen"] != samples:
            raise ConfigError(
                f"{folder} had {content['samples_seen'] // max(self.state.step, 1)} samples a step, this run "
                f"has {self.global_batch} (batch x processes x accumulation); keep the product to resume"
            )
        self.sampler.set_position(self.state.step)
        LOGGER.info("resumed from %s at step %d", folder, self.state.step)

    def _wrap(self, network: PixArt) -> nn.Module:
        network.train()
        if self.config.compile:
            network.compile_blocks()
        if self.ranks.world_size == 1:
            return network
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        # The buffers are constants. torch 2.14 renamed the switch that copies them in every forward pass.
        known = inspect.signature(DistributedDataParallel).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"device_ids": devices, switch: False}
        return DistributedDataParallel(network, **options)

    def _build_saver(self) -> Saver:
        return Saver(
            self.config,
            self.ranks,
            self.state,
            self.work_dir,
            global_batch=self.global_batch,
            steps_per_epoch=self.sampler.steps_per_epoch,
            last_step=self.total_steps,
            resumed_from=self.resumed_from,
        )

    def _total_steps(self) -> int:
        steps = self.config.num_epochs * self.sampler.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    # ---- the run ----

    def fit(self) -> None:
        """Train until the end of the run; the last step is always saved."""
        self._announce()
        self.metrics = self._open_metrics()
        self._show_first_batch()
        self.validation = self._build_validation()
        saver = self._build_saver()
        if self.config.validation.at_start and self.state.step == 0:
            self._validate()
        self._base_lr = scaled_learning_rate(self.config, self.global_batch)
        # A schedule that is not resumed begins anew and ends with the run.
        offset = 0 if self.config.resume_from.resume_lr_scheduler else self.state.step
        factor = lr_factor(self.config, self.total_steps - offset)
        self._factor = lambda step: factor(step - offset)
        window = _Window(self.ranks.device)
        self.started, self.first_step = time.perf_counter(), self.state.step
        micro_batches = self._micro_batches()
        while self.state.step < self.total_steps:
            window.add(*self._train_step(micro_batches, window))
            step = self.state.step
            if falls_on(step, self.config.log_interval, self.total_steps):
                self._log(window)
            if falls_on(step, self.config.validation_every_steps, self.total_steps):
                with window.paused():
                    self._validate()
            if saver.is_due():
                with window.paused():
                    saver.save()
        self._close()

    def _train_step(self, micro_batches: Iterator[Any], window: _Window) -> tuple[Tensor, Tensor]:
        """One optimiser step over a global batch; returns mean loss and gradient norm, on the device."""
        state, accumulation = self.state, self.config.gradient_accumulation_steps
        for group in state.optimizer.param_groups:
            group["lr"] = self._base_lr * self._factor(state.step)
        state.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.ranks.device)
        for index in range(accumulation):
            waited = time.perf_counter()
            batch = next(micro_batches)
            window.waited_s += time.perf_counter() - waited
            with self._synchronised_only_if(index == accumulation - 1), self._autocast():
                output = self.objective.loss(self.model, batch.to(self.ranks.device), self.config.seed)
                state.scaler.scale(output.loss / accumulation).backward()
            loss += output.loss.detach() / accumulation
        state.scaler.unscale_(state.optimizer)
        parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        norm = global_norm(parameters)
        if self.config.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.finish_step()
        return loss, norm

    def _micro_batches(self) -> Iterator[Any]:
        loader = build_loader(
            self.dataset,
            EndlessBatches(self.sampler),
            self.config.num_workers,
            pin_memory=self.ranks.device.type == "cuda",
        )
        yield from loader

    def _synchronised_only_if(self, last: bool) -> Any:
        """Gradients are exchanged once a step, with the last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _autocast(self) -> Any:
        dtype = _AUTOCAST[self.config.mixed_precision]
        return torch.autocast(self.ranks.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    # ---- reports ----

    def _announce(self) -> None:
        config, ranks = self.config, self.ranks
        parameters = sum(p.numel() for p in self.state.network.parameters())
        LOGGER.info(
            "%s, %.1f M parameters, on %d x %s, %s", config.model, parameters / 1e6, ranks.world_size,
            torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu", config.mixed_precision,
        )  # fmt: skip
        LOGGER.info(
            "%d samples; global batch %d = %d x %d processes x %d accumulated; %d steps an epoch, %d in all",
            len(self.dataset), self.global_batch, config.train_batch_size, ranks.world_size,
            config.gradient_accumulation_steps, self.sampler.steps_per_epoch, self.total_steps,
        )  # fmt: skip

    def _show_first_batch(self) -> None:
        if self.metrics is None:
            return
        sheet = first_batch_sheet(self.config, self.dataset, self.sampler, self.ranks.device)
        if sheet is not None:
            path = self.work_dir / "first_batch.png"
            sheet.save(path)
            self.metrics.picture(self.state.step, "first_batch", sheet)
            LOGGER.info("step %d  first batch, decoded from its latents: %s", self.state.step, path)

    def _open_metrics(self) -> MetricsLog | None:
        if not self.ranks.is_main:
            return None
        return MetricsLog(
            self.work_dir,
            self.state.step if self.resumed_from is not None else -1,
            tensorboard=self.reporting.tensorboard,
            project_name=self.reporting.project_name,
        )

    def _log(self, window: _Window) -> None:
        loss, norm = self.ranks.mean(window.means()).tolist()
        seconds, steps = window.seconds(), window.steps
        if not (math.isfinite(loss) and math.isfinite(norm)) and not self.state.scaler.is_enabled():
            raise NumericalError(
                f"loss {loss} and gradient norm {norm} at step {self.state.step} are not finite; the last save is "
                "kept: lower optimizer.lr, or check the features"
            )
        step, lr = self.state.step, self.state.optimizer.param_groups[0]["lr"]
        remaining = (self.total_steps - step) * (time.perf_counter() - self.started) / (step - self.first_step)
        values = {
            self.reporting.loss_name: loss,
            "grad_norm": norm,
            "lr": lr,
            "images_per_s": steps * self.global_batch / seconds,
            "data_wait_share": window.waited_s / seconds,
            "epoch": (step - 1) // self.sampler.steps_per_epoch,
            "remaining_s": remaining,
        }
        if self.ranks.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        window.restart()
        if self.metrics is not None:
            self.metrics.write(step, values)
            LOGGER.info(
                "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.1f images/s  data wait %.1f%%  ETA %s",
                step, self.total_steps, loss, norm, lr, values["images_per_s"], 100 * values["data_wait_share"],
                format_duration(remaining),
            )  # fmt: skip

    # ---- validation ----

    def _build_validation(self) -> tuple[ValidationLoss | None, PromptGrid | None]:
        config = self.config
        if config.validation_every_steps is None:
            return None, None
        loss = ValidationLoss(config, self.objective, self.ranks) if self._has_validation_split() else None  # type: ignore[arg-type]
        has_prompts = bool(config.validation.prompts or config.validation.prompt_file)
        grid = PromptGrid(config, self.ranks.device) if has_prompts and self.ranks.is_main else None
        return loss, grid

    def _has_validation_split(self) -> bool:
        return self.config.data.type == "Store" and self.config.validation.num_samples > 0

    def _validate(self) -> None:
        """Loss on every rank, grid on the main one, both with the averaged weights if there are any."""
        loss_of, grid = self.validation
        if loss_of is None and grid is None:
            return
        network, average, step = self.state.network, self.state.average, self.state.step
        with averaged_weights(network, average) if average else contextlib.nullcontext():
            loss = loss_of(network) if loss_of is not None else None
            picture = grid.draw(network) if grid is not None else None
        if loss is not None and self.metrics is not None:
            self.metrics.write(step, {"validation_loss": loss})
            LOGGER.info("step %d  validation loss %.4f", step, loss)
        if picture is not None and self.metrics is not None:
            path = self.work_dir / "validation" / f"step_{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
            self.metrics.picture(step, "validation", picture)
            LOGGER.info("step %d  validation grid: %s", step, path)
        self.ranks.barrier()

    def _close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
            LOGGER.info("done: %d steps; results in %s", self.state.step, self.work_dir)
        if self.ranks.is_main:
            self.lock.release()
        self.ranks.close()


class _Window:
    """Sums between two log lines; values stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        self.steps, self.waited_s, self._paused_s = 0, 0.0, 0.0
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

    def means(self) -> Tensor:
        return self._sums / self.steps

    def seconds(self) -> float:
        return time.perf_counter() - self._since - self._paused_s
