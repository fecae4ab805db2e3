"""The training loop, once for all families: load, accumulate, clip, step, average, log, validate, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.config import TrainConfig
from diffusion.data import AspectRatioBatchSampler, EndlessBatches, build_loader
from diffusion.errors import ConfigError, PixArtError, PreemptedError
from diffusion.files import write_atomically
from diffusion.objectives import Objective
from diffusion.ranks import Ranks
from diffusion.training.adapter_family import family_of
from diffusion.training.building import build_training_data
from diffusion.training.continuity import check_config, check_data, data_identity, with_saved_start
from diffusion.training.equality import require_equal
from diffusion.training.family import Family
from diffusion.training.faults import Faults
from diffusion.training.finishing import finish_run
from diffusion.training.fused_update import FusedUpdate
from diffusion.training.health import Health, Stragglers, explained_out_of_memory
from diffusion.training.optimization import (
    build_optimizer,
    global_norm,
    lr_factor,
    scaled_learning_rate,
)
from diffusion.training.parallel import AUTOCAST, place, repeatable_kernels, synchronised_only_if, wrap
from diffusion.training.posthoc_snapshots import PosthocAverages
from diffusion.training.recorded_passes import RecordedPasses
from diffusion.training.replay import StepRecorder
from diffusion.training.reports import Reporting, Reports
from diffusion.training.requests import Request, Requests, resume_command
from diffusion.training.run_log import LOGGER, configure_logging
from diffusion.training.saving import Saver, falls_on
from diffusion.training.sharding import is_sharded
from diffusion.training.state import RunState, read_record
from diffusion.training.verdict import Verdict
from diffusion.training.watchdog import Watchdog
from diffusion.training.window import Window
from diffusion.training.work_dir import CHECKPOINTS, find_checkpoint, open_work_dir


class Trainer:
    """One run: a config, an objective, a folder.

    Args:
        config: validated.
        make_objective: called with (config, dataset).
        work_dir: logs, metrics and checkpoints.
        resume_from: a checkpoint folder or "latest"; None starts anew.
        load_from: starting weights of a new run; overrides the config.
        allow_config_change: resume although config or data changed in a way that changes the training.
        family: None = base training, or an adapter if the config asks for one.
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
        allow_config_change: bool = False,
        reporting: Reporting | None = None,
        ranks: Ranks | None = None,
        family: Family | None = None,
    ) -> None:
        self.config, self.reporting, self.family = config, reporting or Reporting(), family or family_of(config)
        self.ranks = ranks or Ranks()
        self.work_dir = Path(work_dir)
        self.checkpoints = self.work_dir / CHECKPOINTS
        resume_from = resume_from or config.resume_from.checkpoint
        self.resumed_from = self._open_work_dir(resume_from)
        record = None if self.resumed_from is None else read_record(self.resumed_from)
        if record is not None:
            self.family.check_kind(record["family"], str(self.resumed_from))
            check_config(record["config"], config, allow=allow_config_change)
            if not self.family.resumes_from_start:
                config = with_saved_start(config, load_from or config.load_from, record["config"].get("load_from"))
                self.config = config
        self.dataset = build_training_data(config)
        if record is not None:
            check_data(record["data"], self.dataset, f"data.root={config.data.root}", allow=allow_config_change)
        self.objective = make_objective(config, self.dataset)
        self.sampler = self._build_sampler()
        torch.manual_seed(config.seed)  # of the initial weights; every later draw is keyed by its sample number
        start, resuming = load_from or config.load_from, self.resumed_from is not None
        network = place(self.family.build_network(config, start, resuming=resuming), config, self.ranks)
        self.state = self._build_state(network)
        self.family.connect(self.objective, network, self.state.average, config)
        self.window = Window(self.ranks.device)
        if self.resumed_from is not None:
            self._restore(self.resumed_from)
        self.model = wrap(network, config, self.ranks)
        self.passes = self._recorded_passes(network)
        self.faults, self.stragglers = Faults(self.ranks.rank), Stragglers(self.ranks)
        self.watchdog = Watchdog(self.ranks, config.health.hang_timeout_s, self.work_dir / "stacks")
        average, folder = self.state.average if self.family.steps_read_average else None, self.work_dir / "replay"
        recorder = StepRecorder(config, self.ranks, self.sampler, self.dataset, network, folder, self.family, average)
        self.state.observe = Health(config, recorder, is_scaled=self.state.scaler.is_enabled()).observe
        self.total_steps = self._total_steps()

    # ---- building ----

    def _open_work_dir(self, resume_from: str | None) -> Path | None:
        """Hold the folder; returns the checkpoint to go on from."""

        def choose() -> Path | None:
            self.lock = open_work_dir(self.work_dir, resume_from)
            configure_logging(self.work_dir, is_main=True)
            return find_checkpoint(self.work_dir, resume_from)

        configure_logging(None, is_main=self.ranks.is_main)
        return self.ranks.on_main(choose)

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

    def _recorded_passes(self, network: Any) -> RecordedPasses | None:
        if not self.config.cuda_graph:
            return None
        if self.ranks.world_size > 1:
            raise ConfigError(
                f"cuda_graph=True trains on one process, and this run has {self.ranks.world_size}; set cuda_graph=False"
            )
        if self.ranks.device.type != "cuda":
            LOGGER.info("cuda_graph=True makes nothing faster on %s", self.ranks.device)
        return RecordedPasses(self._forward_backward, network.parameters(), self.config.model_max_length)

    @property
    def global_batch(self) -> int:
        """Samples an optimiser step."""
        return self.config.train_batch_size * self.ranks.world_size * self.config.gradient_accumulation_steps

    def _build_state(self, network: Any) -> RunState:
        config = self.config
        use_scaler = config.mixed_precision == "fp16" and self.ranks.device.type == "cuda"
        posthoc = config.posthoc_ema if self.ranks.is_main or is_sharded(network) else None
        optimizer = build_optimizer(network, config, self.global_batch)
        average = self.family.build_average(network, config)
        return RunState(
            network=network,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(self.ranks.device.type, enabled=use_scaler),
            average=average,
            fused_update=FusedUpdate(network, optimizer, average) if config.kernels.fused else None,
            posthoc=PosthocAverages(network, posthoc.sigma_rels) if posthoc is not None else None,
            family=self.family,
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
        self.window.restore(content["window"])
        LOGGER.info("resumed from %s at step %d", folder, self.state.step)

    def _build_saver(self) -> Saver:
        facts = {
            "steps_per_epoch": self.sampler.steps_per_epoch,
            "seed": self.config.seed,
            "world_size": self.ranks.world_size,
            "data": data_identity(self.dataset),
            "config": self.config.model_dump(mode="json"),
        }
        return Saver(
            self.config,
            self.ranks,
            self.state,
            self.work_dir,
            facts=facts,
            global_batch=self.global_batch,
            steps_per_epoch=self.sampler.steps_per_epoch,
            last_step=self.total_steps,
            resumed_from=self.resumed_from,
        )

    def _build_reports(self) -> Reports:
        return Reports(
            self.config,
            self.reporting,
            self.ranks,
            self.state,
            self.objective,
            self.dataset,
            self.sampler,
            self.work_dir,
            total_steps=self.total_steps,
            is_resumed=self.resumed_from is not None,
        )

    def _total_steps(self) -> int:
        steps = self.config.num_epochs * self.sampler.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    # ---- the run ----

    def fit(self) -> None:
        """Train until the end of the run, or until Ctrl-C; the last step is always saved.

        Raises:
            PreemptedError: SIGTERM asked for the end; the run was saved. NumericalError: too many steps were skipped.
            PeerLostError: another process died or stood still.
            StorageError, OSError: the last save failed, or `max_failed_saves` in a row.
        """
        self.ranks.on_main(lambda: write_atomically(self.work_dir / "config.json", self.config.to_json().encode()))
        with self.watchdog, repeatable_kernels(self.config.deterministic):
            self._fit()

    def _fit(self) -> None:
        self.reports = self._build_reports()
        self.reports.begin()
        saver = self._build_saver()
        if self.config.validation.at_start and self.state.step == 0:
            self.reports.validate()
        self._base_lr = scaled_learning_rate(self.config, self.global_batch)
        # A schedule that is not resumed begins anew and ends with the run.
        offset = 0 if self.config.resume_from.resume_lr_scheduler else self.state.updates
        factor = lr_factor(self.config, self.total_steps - offset)
        self._factor = lambda step: factor(step - offset)
        self.first_step = self.state.step
        if self.first_step >= self.total_steps:
            LOGGER.warning("the run is at step %d and ends at %d: no step is left", self.first_step, self.total_steps)
        self.window.begin()
        self.reports.start_clock()
        with Requests(self.ranks, self.work_dir) as requests:
            try:
                request = self._run(saver, requests)
            except Exception:
                saver.settle()  # a save that has begun is worth its seconds
                raise
            self._close(saver, request)

    def _run(self, saver: Saver, requests: Requests) -> Request:
        """Step after step until the end or a request to stop, which is returned."""
        micro_batches, window, request = self._micro_batches(), self.window, Request.NONE
        while self.state.step < self.total_steps and request <= Request.SAVE:
            if not saver.is_sound():
                requests.ask(Request.FAIL)
            requests.send()
            window.add(self._train_step(micro_batches, window))
            step, request = self.state.step, requests.agreed()
            if step == self.first_step + 1:
                saver.reserve()
            if falls_on(step, self.config.log_interval, self.total_steps):
                self.reports.log(window)
            if falls_on(step, self.config.validation_every_steps, self.total_steps):
                with window.paused():
                    self._validate(saver)
            if saver.is_due() or request is not Request.NONE:
                with window.paused():
                    self._save(saver, request)
                requests.met(request)
        return request

    def _validate(self, saver: Saver) -> None:
        """As `Reports.validate`; a picture that cannot be drawn does not cost the steps that led to it."""
        try:
            self.reports.validate()
        except (PixArtError, OSError):  # on all processes alike
            self._save(saver, Request.FAIL)
            LOGGER.error(
                "validation failed; step %d is saved, go on with: %s", self.state.step, resume_command(self.ranks)
            )
            raise

    def _save(self, saver: Saver, request: Request) -> None:
        """Begin to save; whatever is logged until here is on the disk before the checkpoint is."""
        self.reports.flush()
        saver.save(self.window.state(), checkpoint=request > Request.NONE, final=request > Request.SAVE)

    def _train_step(self, micro_batches: Iterator[Any], window: Window) -> Verdict:
        """One optimiser step over a global batch, or none where that is not finite on some process."""
        state, step = self.state, self.state.step + 1
        if self.family.steps_read_average:
            state.settle()
        state.optimizer.zero_grad(set_to_none=True)
        with explained_out_of_memory(self.config, self.ranks):
            loss = self._accumulate(micro_batches, window, step)
            self._beat(step, "update")
            state.scaler.unscale_(state.optimizer)
            parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
            self.faults.on_gradients(parameters, step)
            verdict = Verdict(step, loss, global_norm(parameters), self.ranks)
            state.settle()  # the step before this one, while the device is busy with this one
            for group in state.optimizer.param_groups:
                group["lr"] = self._base_lr * self._factor(state.updates)
            state.update(verdict, self.config.gradient_clip)
        self.faults.after_step(state.network, step)
        state.finish_step(verdict)
        self.stragglers.end_step()
        every = self.config.health.check_equal_every_steps
        if every is not None and (step == self.first_step + 1 or step % every == 0):
            require_equal(state, self.ranks)
        self._beat(step, "end", is_step=False)
        return verdict

    def _accumulate(self, micro_batches: Iterator[Any], window: Window, step: int) -> Tensor:
        """Forward and backward over this process's micro-batches; returns their mean loss, on the device."""
        accumulation = self.config.gradient_accumulation_steps
        loss = torch.zeros((), device=self.ranks.device)
        for index in range(accumulation):
            self._beat(step, "data")
            waited = time.perf_counter()
            batch = next(micro_batches)
            waited = time.perf_counter() - waited
            window.waited_s += waited
            self._beat(step, "forward")
            batch = batch.to(self.ranks.device)
            if self.passes is not None:
                self.faults.before_forward(step)
                part = self.passes.run(batch, self.objective.choices(batch), is_first=index == 0)
                loss += self.faults.on_loss(part, step, index) / accumulation
                continue
            with synchronised_only_if(self.model, index == accumulation - 1), self._autocast():
                with self.stragglers.measure(waited):
                    self.faults.before_forward(step)
                    output = self.objective.loss(self.model, batch, self.config.seed)
                part = self.faults.on_loss(output.loss, step, index)
                self._beat(step, "backward")
                self.state.scaler.scale(part / accumulation).backward()
            loss += part.detach() / accumulation
        return loss

    def _forward_backward(self, batch: Any) -> Tensor:
        """A pass as it is recorded; returns its loss."""
        with self._autocast():
            loss = self.objective.loss(self.model, batch, self.config.seed).loss
            self.state.scaler.scale(loss / self.config.gradient_accumulation_steps).backward()
        return loss.detach()

    def _beat(self, step: int, phase: str, *, is_step: bool = True) -> None:
        """Progress for the watchdog; the first step of a start may compile, and has more time."""
        self.watchdog.beat(step, phase, is_step=is_step and step > self.first_step + 1)

    def _micro_batches(self) -> Iterator[Any]:
        loader = build_loader(
            self.dataset,
            EndlessBatches(self.sampler),
            self.config.num_workers,
            pin_memory=self.ranks.device.type == "cuda",
        )
        yield from loader

    def _autocast(self) -> Any:
        dtype = AUTOCAST[self.config.mixed_precision]
        return torch.autocast(self.ranks.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _close(self, saver: Saver, request: Request) -> None:
        """Wait for the last save, then say how the run ended."""
        self.ranks.on_main(saver.finish)
        self.reports.close()
        step, end = self.state.step, f"after step {self.state.step} of {self.total_steps}; go on with: "
        end += resume_command(self.ranks)
        if step == self.total_steps:
            finish_run(self.work_dir, self.config, self.state, self.ranks)
            LOGGER.info("done: %d steps; results in %s", step, self.work_dir)
        elif request is Request.INTERRUPT:
            LOGGER.info("stopped by Ctrl-C and saved %s", end)
        if self.ranks.is_main:
            self.lock.release()
        self.ranks.close()
        if step < self.total_steps and request is Request.PREEMPT:
            raise PreemptedError(f"SIGTERM: saved {end}")
