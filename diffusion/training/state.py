"""What a run saves and restores: weights, average, optimiser, scaler and counters, as one `checkpoint-N` folder."""

from __future__ import annotations

import contextlib
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from diffusion import __version__
from diffusion.checkpoints import load_weights, read_transformer, write_transformer
from diffusion.checkpoints.training_state import FORMAT_VERSION, save_checkpoint, verify
from diffusion.config import TrainConfig
from diffusion.errors import CheckpointError
from diffusion.models import PixArt
from diffusion.training import posthoc_snapshots
from diffusion.training.building import build_network
from diffusion.training.optimization import WeightAverage
from diffusion.training.posthoc_snapshots import PosthocAverages
from diffusion.training.sharding import gather, is_sharded, parts_like, whole
from diffusion.training.starting import require_same_prediction
from diffusion.training.verdict import Verdict

TRAINER_FILE = "trainer.json"


@dataclass
class Contents:
    """The tensors of a checkpoint, whole, whatever the run shares out; None = the run has none.

    `posthoc` is None as well where the averages are written as they are.
    """

    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    posthoc: Mapping[float, Mapping[str, Tensor]] | None
    optimizer: dict[str, Any]


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
    step: int = 0
    skipped_steps: int = 0
    observe: Callable[[Verdict], None] | None = None
    _verdict: Verdict | None = None

    @property
    def updates(self) -> int:
        """Optimiser steps that changed the weights: the position in the learning-rate schedule."""
        return self.step - self.skipped_steps

    def finish_step(self, verdict: Verdict) -> None:
        """Count a step; its weights enter the averages when the verdict is read."""
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
                self.average.update(self.network)
            if self.posthoc is not None:
                self.posthoc.update(self.network, verdict.step)
        if self.observe is not None:
            self.observe(verdict)

    def gathered(self, *, keep: bool, checkpoint: bool = True) -> Contents | None:
        """What a sharded run saves, whole and in host memory; every process must call this. None if nothing is sharded.

        Args:
            keep: whether this process wants it; the others get empty parts.
            checkpoint: False gathers the post-hoc averages alone.
        """
        self.settle()
        if not is_sharded(self.network):
            return None
        posthoc = self.posthoc.gathered(keep=keep) if self.posthoc is not None else None
        if not checkpoint:
            return Contents({}, None, posthoc, {})
        average = gather(self.average.tensors, keep=keep) if self.average is not None else None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = get_optimizer_state_dict(self.network, self.optimizer, options=options)
        return Contents(gather(self.network.state_dict(), keep=keep), average, posthoc, optimizer)

    def _contents(self) -> Contents:
        """What a run saves that is not sharded: its tensors as they are."""
        self.settle()
        average = self.average.tensors if self.average is not None else None
        optimizer = get_optimizer_state_dict(self.network, self.optimizer)
        return Contents(self.network.state_dict(), average, None, optimizer)

    def save(
        self, root: Path, facts: dict[str, Any], *, stored_null_caption: bool, contents: Contents | None = None
    ) -> Path:
        """Write `root/checkpoint-<step>`: transformer/, transformer_ema/, posthoc_ema/, training_state/, trainer.json.

        Args:
            facts: of the run (seed, world size, config, ...), kept in trainer.json.
            contents: what `gathered` gave.
        Raises:
            StorageError, OSError: the disk is full or failing; nothing is left behind.
        """
        contents = contents or self._contents()
        weights = sum(tensor.nbytes for tensor in contents.weights.values())
        posthoc = 0 if self.posthoc is None else self.posthoc.nbytes
        null_caption = ("y_embedder.y_embedding",) if stored_null_caption else ()

        def write(folder: Path) -> None:
            for name, tensors in (("transformer", contents.weights), ("transformer_ema", contents.average)):
                if tensors is not None:
                    on_cpu = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
                    write_transformer(on_cpu, self.network.config, folder / name, native_only=null_caption)
            if self.posthoc is not None:
                self.posthoc.write(folder / posthoc_snapshots.FOLDER, self.step, torch.float32, contents.posthoc)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
                dcp.save({"optimizer": contents.optimizer}, checkpoint_id=folder / "training_state", no_dist=True)
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            versions |= {"diffusers": diffusers.__version__, "pixart": __version__}
            content = {
                "format_version": FORMAT_VERSION,
                "step": self.step,
                "skipped_steps": self.skipped_steps,
                "scaler": self.scaler.state_dict(),
                "ema_updates": self.average.num_updates if self.average is not None else None,
                "versions": versions,
                **facts,
            }
            (folder / TRAINER_FILE).write_text(json.dumps(content, indent=2) + "\n")

        return save_checkpoint(root, self.step, 4 * weights + posthoc + (1 << 20), write)

    def restore(self, folder: Path, *, load_ema: bool = False, resume_optimizer: bool = True) -> dict[str, Any]:
        """Load everything that `save` wrote; returns the content of trainer.json.

        Args:
            load_ema: the trained weights go on from the averaged ones.
            resume_optimizer: False starts with fresh moments.
        Raises:
            CheckpointError: the folder is damaged, or belongs to another model.
        """
        problem = verify(folder)
        if problem is not None:
            raise CheckpointError(f"{folder} cannot be resumed: {problem}")
        content = json.loads((folder / TRAINER_FILE).read_text())
        if load_ema and content["ema_updates"] is None:
            raise CheckpointError(f"{folder} has no EMA weights; set resume_from.load_ema=False")
        stored, weights = read_transformer(folder, ema=load_ema)
        require_same_prediction(self.network, getattr(stored, "prediction_type", "epsilon"), folder)
        load_weights(self.network, parts_like(self.network.state_dict(), weights), folder)
        if self.average is not None:
            if content["ema_updates"] is None:
                raise CheckpointError(f"{folder} has no EMA weights; set ema_rate=None to resume without them")
            _, averaged = read_transformer(folder / "transformer_ema")
            self.average.load(averaged, content["ema_updates"])
        if self.posthoc is not None:
            self.posthoc.read(folder / posthoc_snapshots.FOLDER, content["step"])
        if resume_optimizer:
            self._restore_optimizer(folder / "training_state")
        self.scaler.load_state_dict(content["scaler"])
        self.step, self.skipped_steps = content["step"], content.get("skipped_steps", 0)
        return content

    def _restore_optimizer(self, folder: Path) -> None:
        state = {"optimizer": get_optimizer_state_dict(self.network, self.optimizer)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"])


@contextlib.contextmanager
def evaluated_network(state: RunState, config: TrainConfig) -> Iterator[PixArt]:
    """A network for validation, with the averaged weights if the run has any.

    It is the trained one with other weights for a while; of a sharded run a whole copy, made by all processes together,
    since each of them may then call it as often as it likes.
    """
    state.settle()
    network, average = state.network, state.average
    if not is_sharded(network):
        with averaged_weights(network, average) if average is not None else contextlib.nullcontext(network) as same:
            yield same
        return
    with torch.device("meta"):
        copy = build_network(config)
    tensors = average.tensors if average is not None else network.state_dict()
    copy.load_state_dict({key: whole(tensor.detach()).clone() for key, tensor in tensors.items()}, assign=True)
    yield copy


class averaged_weights:
    """Within this context a network holds its averaged weights."""

    def __init__(self, network: PixArt, average: WeightAverage) -> None:
        self.network, self.average = network, average

    def __enter__(self) -> PixArt:
        self.raw = {key: tensor.detach().clone() for key, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.tensors)
        return self.network

    def __exit__(self, *_: object) -> None:
        self.network.load_state_dict(self.raw)
