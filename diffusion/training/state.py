"""What a run saves and restores: weights, average, optimiser, scaler and counters, as one `checkpoint-N` folder."""

from __future__ import annotations

import contextlib
import json
import platform
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from diffusion import __version__
from diffusion.checkpoints.training_state import FORMAT_VERSION
from diffusion.errors import CheckpointError, StorageError
from diffusion.models import PixArt
from diffusion.training import posthoc_snapshots
from diffusion.training.family import Family
from diffusion.training.fused_update import FusedUpdate
from diffusion.training.host_copy import HostCopies
from diffusion.training.optimization import WeightAverage, update_unless
from diffusion.training.posthoc_snapshots import PosthocAverages, write_averages
from diffusion.training.sharding import is_sharded, on_shards, whole_copy
from diffusion.training.verdict import Verdict

TRAINER_FILE = "trainer.json"


@dataclass
class RunState:
    """The mutable parts of a run. `network` is the bare module; step counts global batches that were consumed.

    `skipped_steps` of them left everything else as it was. Whether the last one did is known when `settle` reads its
    verdict; whoever reads weights or averages for other ends than training calls that first. `observe` gets every
    verdict. `posthoc` is held by the rank that saves, alone; by all of them if the network is sharded.
    """

    network: PixArt
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    posthoc: PosthocAverages | None = None
    fused_update: FusedUpdate | None = None
    step: int = 0
    skipped_steps: int = 0
    observe: Callable[[Verdict], None] | None = None
    family: Family = field(default_factory=Family)
    _verdict: Verdict | None = None
    _averaged: Collection[str] = ()

    @property
    def updates(self) -> int:
        """Optimiser steps that changed the weights: the position in the learning-rate schedule."""
        return self.step - self.skipped_steps

    def update(self, verdict: Verdict, clip: float | None) -> None:
        """Clip the gradients and take the optimiser's step, or leave all as it is if the verdict says so.

        Args:
            clip: what the norm of all gradients may be at most.
        """
        fused, self._averaged = self.fused_update, ()
        if fused is not None and not self.scaler.is_enabled() and fused(verdict.skip, verdict.norm, clip):
            self._averaged = fused.averaged
            return
        with on_shards(self.optimizer) as shards:
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(shards, clip, verdict.norm)
            update_unless(verdict.skip, self.optimizer, self.scaler)

    def finish_step(self, verdict: Verdict) -> None:
        """Count a step; its weights enter the averages when the verdict is read, where `update` has not done it."""
        self.settle()
        self.step += 1
        self._verdict = verdict

    def settle(self) -> None:
        """Read the verdict of the last step, if that is still to be done, and fold its weights into the averages.

        Raises:
            NumericalError: too many steps were skipped.
        """
        if self._verdict is None:
            return
        verdict, self._verdict = self._verdict, None
        if verdict.read().skipped:
            self.skipped_steps += 1
        else:
            if self.average is not None:
                self.average.update(self.network, done=self._averaged)
            if self.posthoc is not None:
                self.posthoc.update(self.network, verdict.step)
        if self.observe is not None:
            self.observe(verdict)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the weights, so that all of them take part in a save."""
        return is_sharded(self.network)

    def reserve_on_host(self, copies: HostCopies) -> Callable[[], None]:
        """A job for another thread: the memory that `copy_to_host` will fill. All ranks ask for it."""
        tensors = self._saved_tensors() if self.optimizer.state else {}
        return lambda: copies.reserve(tensors)

    def copy_to_host(self, copies: HostCopies, facts: Mapping[str, Any]) -> HostState:
        """Everything a checkpoint holds, as of now, in host memory.

        Args:
            facts: of the run (seed, world size, config, ...), kept in trainer.json.
        """
        self.settle()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"diffusers": version("diffusers"), "pixart": __version__}
        record = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.average.num_updates if self.average is not None else None,
            "versions": versions,
            "family": self.family.record(),
            **facts,
        }
        return HostState(self.step, self.network, self.family, record, **copies.take(self._saved_tensors()))

    def _saved_tensors(self) -> dict[str, Any]:
        return {
            "weights": self.family.saved(self.network),
            "averaged": self.average.tensors if self.average is not None else None,
            "posthoc": self.posthoc.tensors if self.posthoc is not None else None,
            "optimizer": get_optimizer_state_dict(self.network, self.optimizer),
        }

    def restore(self, folder: Path, *, load_ema: bool = False, resume_optimizer: bool = True) -> dict[str, Any]:
        """Load everything that `HostState.write` wrote into a checkpoint that was verified; returns its record.

        Args:
            load_ema: the trained weights go on from the averaged ones.
            resume_optimizer: False starts with fresh moments.
        Raises:
            CheckpointError: the folder belongs to another model, or lacks what the run needs.
        """
        record = read_record(folder)
        if load_ema and record["ema_updates"] is None:
            raise CheckpointError(f"{folder} has no EMA weights; set resume_from.load_ema=False")
        self.family.check_facts(record["family"], folder)
        if self.average is not None:
            if record["ema_updates"] is None:
                raise CheckpointError(f"{folder} has no EMA weights; set ema_rate=None to resume without them")
            self.family.restore(self.network, folder, ema=True)  # for a moment
            averaged = self.network.state_dict()
            self.average.load({key: averaged[key] for key in self.average.tensors}, record["ema_updates"])
        self.family.restore(self.network, folder, ema=load_ema)
        if self.posthoc is not None:
            self.posthoc.read(folder / posthoc_snapshots.FOLDER, record["step"])
        if resume_optimizer:
            self._restore_optimizer(folder / "training_state")
        self.scaler.load_state_dict(record["scaler"])
        self.step, self.skipped_steps = record["step"], record["skipped_steps"]
        return record

    def _restore_optimizer(self, folder: Path) -> None:
        state = {"optimizer": get_optimizer_state_dict(self.network, self.optimizer)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(state, checkpoint_id=folder, no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(
                f"{folder} does not fit the optimizer ({_reason(error)}); use the one it was saved with, or set "
                "resume_from.resume_optimizer=False"
            ) from None
        set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"])


@dataclass
class HostState:
    """A run's state after a step, in host memory: what one checkpoint holds."""

    step: int
    network: PixArt  # for its structure alone; its tensors go on training
    family: Family
    record: dict[str, Any]
    weights: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    posthoc: dict[float, dict[str, Tensor]] | None
    optimizer: dict[str, Any] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, nearly."""
        return _nbytes([self.weights, self.averaged, self.posthoc, self.optimizer]) + (1 << 20)

    def write(self, folder: Path, *, stored_null_caption: bool) -> None:
        """Fill a folder: transformer/, transformer_ema/, posthoc_ema/, training_state/, trainer.json.

        Raises:
            StorageError, OSError: the disk is full or failing.
        """
        for tensors, ema in ((self.weights, False), (self.averaged, True)):
            if tensors is not None:
                self.family.write(tensors, self.network, folder, ema=ema, stored_null_caption=stored_null_caption)
        if self.posthoc is not None:
            write_averages(self.posthoc, folder / posthoc_snapshots.FOLDER, self.step, torch.float32)
        self._write_optimizer(folder / "training_state")
        (folder / TRAINER_FILE).write_text(json.dumps(self.record, indent=2) + "\n")

    def _write_optimizer(self, folder: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
                dcp.save({"optimizer": self.optimizer}, checkpoint_id=folder, no_dist=True)
        except CheckpointException as error:  # no Exception, and twenty lines of traceback
            raise StorageError(f"{folder} could not be written ({_reason(error)})") from None


def read_record(folder: Path) -> dict[str, Any]:
    """Content of trainer.json of any format version, in the newest one's form."""
    record: dict[str, Any] = json.loads((folder / TRAINER_FILE).read_bytes())
    if record["format_version"] < 2:  # its next log line averages the steps after the checkpoint alone
        record |= {"window": None, "data": None, "skipped_steps": 0, "family": {}}
    return record


def _reason(error: CheckpointException) -> str:
    """The first failure that torch.distributed.checkpoint wraps, in one line."""
    cause, _ = next(iter(error.failures.values()))
    return " ".join(str(cause).split()) or type(cause).__name__


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0


@contextlib.contextmanager
def evaluated_network(state: RunState) -> Iterator[Any]:
    """A network for validation, with the averaged weights if the run has any.

    It is the trained one with other weights for a while; of a sharded run a whole copy, made by all processes together,
    since each of them may then call it as often as it likes.
    """
    state.settle()
    network, average = state.network, state.average
    if is_sharded(network):
        yield whole_copy(network, average.tensors if average is not None else {})
        return
    with averaged_weights(network, average) if average is not None else contextlib.nullcontext(network) as same:
        yield same


class averaged_weights:
    """Within this context a network holds its averaged weights."""

    def __init__(self, network: PixArt, average: WeightAverage) -> None:
        self.network, self.average = network, average

    def __enter__(self) -> PixArt:
        state = self.network.state_dict()
        self.raw = {key: state[key].detach().clone() for key in self.average.tensors}  # some families average a part
        self.network.load_state_dict(self.average.tensors, strict=False)
        return self.network

    def __exit__(self, *_: object) -> None:
        self.network.load_state_dict(self.raw, strict=False)
