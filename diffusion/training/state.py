"""What a run saves and restores: weights, average, optimiser, scaler and counters, as one `checkpoint-N` folder."""

from __future__ import annotations

import json
import platform
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from diffusion import __version__
from diffusion.checkpoints.training_state import FORMAT_VERSION, save_checkpoint, verify
from diffusion.errors import CheckpointError
from diffusion.models import PixArt
from diffusion.training import posthoc_snapshots
from diffusion.training.optimization import WeightAverage, trained_state
from diffusion.training.posthoc_snapshots import PosthocAverages
from diffusion.training.saved_weights import AdapterWeights, TransformerWeights

TRAINER_FILE = "trainer.json"


@dataclass
class RunState:
    """The mutable parts of a run. `network` is the bare module; step counts finished optimiser steps.

    `posthoc` is held by the rank that saves, alone.
    """

    network: PixArt
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    posthoc: PosthocAverages | None = None
    step: int = 0
    saved: TransformerWeights | AdapterWeights = field(default_factory=TransformerWeights)

    def finish_step(self) -> None:
        """Count an optimiser step and fold its weights into the averages."""
        self.step += 1
        if self.average is not None:
            self.average.update(self.network)
        if self.posthoc is not None:
            self.posthoc.update(self.network, self.step)

    def save(self, root: Path, facts: dict[str, Any], *, stored_null_caption: bool) -> Path:
        """Write `root/checkpoint-<step>`: transformer/, transformer_ema/, posthoc_ema/, training_state/, trainer.json.

        Args:
            facts: of the run (seed, world size, config, ...), kept in trainer.json.
        Raises:
            StorageError, OSError: the disk is full or failing; nothing is left behind.
        """
        weights = sum(tensor.nbytes for tensor in trained_state(self.network).values())
        posthoc = 0 if self.posthoc is None else self.posthoc.nbytes

        def write(folder: Path) -> None:
            self.saved.write(self.network, folder, averaged=False, stored_null_caption=stored_null_caption)
            if self.average is not None:
                with averaged_weights(self.network, self.average):
                    self.saved.write(self.network, folder, averaged=True, stored_null_caption=stored_null_caption)
            if self.posthoc is not None:
                self.posthoc.write(folder / posthoc_snapshots.FOLDER, self.step, torch.float32)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
                state = {"optimizer": get_optimizer_state_dict(self.network, self.optimizer)}
                dcp.save(state, checkpoint_id=folder / "training_state", no_dist=True)
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            versions |= {"diffusers": diffusers.__version__, "pixart": __version__}
            content = {
                "format_version": FORMAT_VERSION,
                "step": self.step,
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
        if self.average is not None:
            if content["ema_updates"] is None:
                raise CheckpointError(f"{folder} has no EMA weights; set ema_rate=None to resume without them")
            self.saved.read(self.network, folder, averaged=True)
            self.average.load(trained_state(self.network), content["ema_updates"])
        self.saved.read(self.network, folder, averaged=load_ema)
        if self.posthoc is not None:
            self.posthoc.read(folder / posthoc_snapshots.FOLDER, content["step"])
        if resume_optimizer:
            self._restore_optimizer(folder / "training_state")
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        return content

    def _restore_optimizer(self, folder: Path) -> None:
        state = {"optimizer": get_optimizer_state_dict(self.network, self.optimizer)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"])


class averaged_weights:
    """Within this context a network holds its averaged weights."""

    def __init__(self, network: PixArt, average: WeightAverage) -> None:
        self.network, self.average = network, average

    def __enter__(self) -> PixArt:
        self.raw = {key: tensor.detach().clone() for key, tensor in trained_state(self.network).items()}
        self.network.load_state_dict(self.average.tensors, strict=False)
        return self.network

    def __exit__(self, *_: object) -> None:
        self.network.load_state_dict(self.raw, strict=False)
