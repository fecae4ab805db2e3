"""What a training family does otherwise than base training: its network, its average, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoints import load_weights, open_checkpoint, read_transformer, write_transformer
from diffusion.config import TrainConfig
from diffusion.errors import CheckpointError, ConfigError
from diffusion.objectives import Objective
from diffusion.training.building import build_network, denoising_objective
from diffusion.training.optimization import WeightAverage, trained_state
from diffusion.training.sharding import parts_like
from diffusion.training.starting import require_same_prediction
from diffusion.training.validation import PromptGrid

FAKE_SCORE = "fake_score"  # folder of DMD's second network in a checkpoint


class Family:
    """Base training; other families override what differs. One object belongs to one run.

    steps_read_average: whether the average takes part in a step. Each step then waits for the one before to enter it,
    and a skipped one is written down with it.
    resumes_from_start: whether resumed runs need the weights that they began from, as a teacher or a frozen base.
    """

    steps_read_average = False
    resumes_from_start = False

    def objective(self, config: TrainConfig, dataset: Any) -> Objective:
        """What a step minimises."""
        return denoising_objective(config, dataset)

    def build_network(self, config: TrainConfig, start: str | Path | None, *, resuming: bool) -> Any:
        """The network of the run, in float32 on the CPU; what shall not train has `requires_grad` False.

        Args:
            start: starting weights; resuming: a checkpoint will be restored, so base training needs none.
        """
        return build_network(config, None if resuming else start)

    def build_average(self, network: Any, config: TrainConfig) -> WeightAverage | None:
        """The average of the trained weights that a checkpoint holds too."""
        return WeightAverage(network, config.ema_rate) if config.ema_rate is not None else None

    def connect(self, objective: Objective, network: Any, average: WeightAverage | None, config: TrainConfig) -> None:
        """Give the objective what it needs beside the network, on its device; called once, before a restore."""

    def build_grid(self, config: TrainConfig, device: torch.device, dataset: Any) -> PromptGrid:
        """What draws the validation pictures."""
        return PromptGrid(config, device)

    def record(self) -> dict[str, Any]:
        """What trainer.json keeps of it."""
        return {"kind": type(self).__name__, **self.facts()}

    def check_kind(self, stored: Mapping[str, Any], folder: str) -> None:
        """Refuse to resume a run of another family, whose objective and weights are others.

        Raises:
            ConfigError: naming both; checkpoints of earlier versions, which did not say, pass.
        """
        began, own = stored.get("kind"), type(self).__name__
        if began is not None and began != own:
            names = {"Family": "base training", "AdapterFamily": "an adapter (lora in the config)"}
            raise ConfigError(
                f"{folder} is of {names.get(began, began)}, and this program trains {names.get(own, own)}; resume it "
                "with the program and config that began it, or take another --work-dir"
            )

    def facts(self) -> dict[str, Any]:
        """What a resumed run must agree with beside its kind."""
        return {}

    def check_facts(self, stored: dict[str, Any], folder: Path) -> None:
        """Refuse to resume a run that began otherwise."""
        for name, value in self.facts().items():
            if stored.get(name, value) != value:  # older checkpoints kept fewer
                raise ConfigError(
                    f"{folder} was trained with another {name.replace('_', ' ')} ({stored.get(name)}, now {value}); "
                    "give the same --load-from to resume"
                )

    def saved(self, network: Any) -> dict[str, Tensor]:
        """What a checkpoint holds of the network, by the names of its state dict; a copy of it goes to `write`."""
        return trained_state(network)

    def write(
        self, tensors: Mapping[str, Tensor], network: Any, folder: Path, *, ema: bool, stored_null_caption: bool
    ) -> None:
        """Write the trained weights into a checkpoint, while training goes on.

        Args:
            tensors: what `saved` gave, or the average of it (`ema`), in host memory.
            network: for its structure; its own tensors may have changed.
        """
        name, kept = _folder("transformer", ema), ("y_embedder.y_embedding",) if stored_null_caption else ()
        write_transformer(tensors, network.config, folder / name, native_only=kept)

    def restore(self, network: Any, folder: Path, *, ema: bool) -> None:
        """Give the network what `write` wrote, strictly."""
        config, tensors = read_transformer(folder / _folder("transformer", ema))
        require_same_prediction(network, getattr(config, "prediction_type", "epsilon"), folder)
        load_weights(network, parts_like(network.state_dict(), tensors), folder)


class OnABase(Family):
    """A family that needs the weights it starts from in every run, resumed ones too: as its teacher, or below it."""

    base_name = "base"
    resumes_from_start = True
    _base_fingerprint = ""

    def build_base(self, config: TrainConfig, start: str | Path | None) -> Any:
        """The frozen base, strictly loaded.

        Raises:
            ConfigError: no starting weights, or an option that this family does not have.
        """
        from diffusion.inference.recipe import model_fingerprint  # programs that never draw start faster without it

        if start is None:
            raise ConfigError(f"load_from: the {self.base_name} is missing; give its weights with --load-from")
        options = (("posthoc_ema", None), ("lora", None), ("tread", None), ("repa", None))
        for name, off in options:
            if getattr(config, name) != off:
                raise ConfigError(f"{name} is not offered by this program; set {name}={off}")
        base = build_network(config, start).requires_grad_(False)
        self._base_fingerprint = model_fingerprint(base)
        return base

    def build_teacher(self, config: TrainConfig, start: str | Path | None) -> Any:
        """`build_base` for families that distil.

        Raises:
            CheckpointError: the teacher is a latent consistency model, or a generator of one step.
        """
        teacher = self.build_base(config, start)
        assert start is not None  # build_base has checked it
        if open_checkpoint(start).found.lcm or (Path(start) / FAKE_SCORE).is_dir():
            raise CheckpointError(f"{start} is distilled already; give the model that it was distilled from")
        return teacher

    def facts(self) -> dict[str, Any]:
        return {f"fingerprint_of_{self.base_name}": self._base_fingerprint}


def _folder(name: str, ema: bool) -> str:
    return f"{name}_ema" if ema else name
