"""LCM and LCM-LoRA: latent consistency distillation of a whole network, or of adapters in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.adapters import adapters_off, read_adapter, read_adapter_from, start_lora, write_adapter
from diffusion.config import TrainConfig
from diffusion.errors import ConfigError
from diffusion.inference import make_scheduler
from diffusion.inference.solvers import stock_scheduler
from diffusion.objectives import ConsistencyObjective, Objective, Roles
from diffusion.training.adapter_family import load_adapter
from diffusion.training.building import denoising_objective
from diffusion.training.family import OnABase
from diffusion.training.optimization import WeightAverage
from diffusion.training.parallel import place_frozen
from diffusion.training.sharding import shell_of
from diffusion.training.validation import PromptGrid


def consistency_objective(config: TrainConfig, dataset: Any) -> ConsistencyObjective:
    """Latent consistency distillation as the config describes it.

    Raises:
        ConfigError: a null caption that the data cannot give, or DDIM steps that do not divide the process.
    """
    base = denoising_objective(config, dataset)
    if config.train_sampling_steps % config.num_ddim_timesteps:
        raise ConfigError(
            f"num_ddim_timesteps={config.num_ddim_timesteps} must divide train_sampling_steps="
            f"{config.train_sampling_steps}, e.g. 50"
        )
    return ConsistencyObjective(
        process=base.process,
        scale_factor=base.scale_factor,
        class_dropout_prob=base.class_dropout_prob,
        null_embeds=base.null_embeds,
        sample_latents=base.sample_latents,
        caption_length=base.caption_length,
        prediction_type=base.prediction_type,
        flow_shift=base.flow_shift,
        num_ddim_steps=config.num_ddim_timesteps,
        guidance=(config.w_min, config.w_max) if config.w_drawn else (config.cfg_scale, config.cfg_scale),
        huber_c=config.huber_c if config.loss_type == "huber" else None,
    )


class LCM(OnABase):
    """Teacher, student and target begin alike; the target is the student's average of rate `ema_decay`.

    A checkpoint holds the student (`transformer/`), the target (`transformer_ema/`) and the LCM scheduler's config, by
    which it is recognised.
    """

    base_name = "teacher"
    steps_read_average = True

    def objective(self, config: TrainConfig, dataset: Any) -> ConsistencyObjective:
        return consistency_objective(config, dataset)

    def build_network(self, config: TrainConfig, start: str | Path | None, *, resuming: bool) -> Any:
        self.teacher = self.build_teacher(config, start)
        return copy.deepcopy(self.teacher).requires_grad_()

    def build_average(self, network: Any, config: TrainConfig) -> WeightAverage:
        return WeightAverage(network, config.ema_decay, warm_up=False)

    def connect(self, objective: Objective, network: Any, average: WeightAverage | None, config: TrainConfig) -> None:
        assert isinstance(objective, ConsistencyObjective) and average is not None
        target = place_frozen(shell_of(network), network, config)
        average.live_in(target)
        objective.roles = Roles(place_frozen(self.teacher, network, config), target)

    def build_grid(self, config: TrainConfig, device: torch.device, dataset: Any) -> PromptGrid:
        return PromptGrid(config, device, "lcm")

    def write(
        self, tensors: Mapping[str, Tensor], network: Any, folder: Path, *, ema: bool, stored_null_caption: bool
    ) -> None:
        super().write(tensors, network, folder, ema=ema, stored_null_caption=stored_null_caption)
        kind = network.config.prediction_type
        scheduler = make_scheduler("lcm", prediction_type=kind, flow_shift=network.config.flow_shift)
        stock_scheduler(scheduler).save_pretrained(folder / "scheduler")


class LCMLoRA(LCM):
    """Adapters of rank `lora_rank` are the student; without them the same network is the teacher.

    The target is the student itself, without gradients. A checkpoint holds the adapters alone, in all layouts.
    """

    steps_read_average = False

    def build_network(self, config: TrainConfig, start: str | Path | None, *, resuming: bool) -> Any:
        network = self.build_teacher(config, start)
        start_lora(network, config.lora_rank, alpha=config.lora_rank)
        self.base = str(start)
        return network

    def build_average(self, network: Any, config: TrainConfig) -> None:  # type: ignore[override]
        return None

    def connect(self, objective: Objective, network: Any, average: WeightAverage | None, config: TrainConfig) -> None:
        assert isinstance(objective, ConsistencyObjective)
        objective.roles = Roles(None, None, adapters_off)

    def write(
        self, tensors: Mapping[str, Tensor], network: Any, folder: Path, *, ema: bool, stored_null_caption: bool
    ) -> None:
        write_adapter(replace(read_adapter_from(network, values=tensors), base_model=self.base), folder)

    def restore(self, network: Any, folder: Path, *, ema: bool) -> None:
        load_adapter(network, read_adapter(folder))
