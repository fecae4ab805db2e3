"""ControlNet training: the branch learns to follow conditions, the base stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion.checkpoints import load_branch, read_branch
from diffusion.checkpoints.branch import BRANCH_FOLDER, find_branch, write_branch
from diffusion.config import TrainConfig
from diffusion.data import SampleKey
from diffusion.errors import CheckpointError, ConfigError
from diffusion.features.conditions import Detector, load_detector
from diffusion.images import decode_latents, encode_moments, labelled_grid, load_vae, to_pil
from diffusion.models import ControlPixArt
from diffusion.objectives import ControlObjective
from diffusion.objectives.control import ConditionOfLatents
from diffusion.training.building import build_training_data, denoising_objective
from diffusion.training.family import OnABase
from diffusion.training.optimization import WeightAverage
from diffusion.training.sharding import parts_like
from diffusion.training.validation import PromptGrid

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusion.objectives import Objective


class ControlNet(OnABase):
    """`copy_blocks_num` control blocks around the base of `load_from`.

    A checkpoint holds the branch alone (`controlnet/`, with EMA `controlnet_ema/`), see `save_branch`. The condition
    comes with the data, or with `control_condition` is computed in every step from the decoded latents.
    """

    def objective(self, config: TrainConfig, dataset: Any) -> ControlObjective:
        if config.train_ratio < 1 and config.data.type != "InternalDataHed":
            raise ConfigError("train_ratio is read by data.type='InternalDataHed' alone; leave it out, or 1")
        stored = getattr(dataset, "has_conditions", False)
        if not stored and config.control_condition is None:
            raise ConfigError(
                f"data.root={config.data.root}: its samples have no condition; extract them with --condition "
                "hed|canny|FOLDER, or set control_condition='canny' or 'hed' to compute it in every step"
            )
        if stored and config.control_condition is not None:
            raise ConfigError(
                f"control_condition={config.control_condition!r} computes what data.root={config.data.root} holds; set "
                "it to None"
            )
        base = denoising_objective(config, dataset)
        return ControlObjective(**vars(base))

    def build_network(self, config: TrainConfig, start: str | Path | None, *, resuming: bool) -> Any:
        base = self.build_base(config, start)
        try:
            return ControlPixArt(base, config.copy_blocks_num)
        except ValueError as error:
            raise ConfigError(f"copy_blocks_num={config.copy_blocks_num}: {error}") from error

    def build_average(self, network: Any, config: TrainConfig) -> WeightAverage | None:
        if config.ema_rate is None:
            return None
        keys = [key for key in network.state_dict() if key.startswith("controlnet.")]
        return WeightAverage(network, config.ema_rate, keys=keys)

    def connect(self, objective: Objective, network: Any, average: WeightAverage | None, config: TrainConfig) -> None:
        assert isinstance(objective, ControlObjective)
        if config.control_condition is not None:
            objective.make_condition = condition_of_latents(config, network.device)

    def build_grid(self, config: TrainConfig, device: torch.device, dataset: Any) -> ControlGrid:
        return ControlGrid(config, device, dataset)

    def write(
        self, tensors: Mapping[str, Tensor], network: Any, folder: Path, *, ema: bool, stored_null_caption: bool
    ) -> None:
        write_branch(tensors, network.config, folder / (f"{BRANCH_FOLDER}_ema" if ema else BRANCH_FOLDER))

    def restore(self, network: Any, folder: Path, *, ema: bool) -> None:
        path = find_branch(folder, ema=ema)
        if path is None:
            raise CheckpointError(f"{folder} holds no controlnet/; give a checkpoint-N of train_controlnet.py")
        load_branch(network, parts_like(network.state_dict(), read_branch(path)[1]), folder)


def condition_of_latents(config: TrainConfig, device: torch.device) -> ConditionOfLatents:
    """The function that decodes pictures, finds their edges and encodes them.

    Raises:
        CheckpointError: no VAE at vae_pretrained or in pipeline_load_from, or no HED weights at hed_path.
    """
    vae = load_vae(config.pipeline_load_from or config.vae_pretrained, device=device)
    detector = load_detector(config.control_condition, config.hed_path, device)
    assert detector is not None  # the schema allows detectors alone
    return partial(_edges_of, vae, detector)


def _edges_of(vae: Any, detector: Detector, latents_mean: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(latents_mean.device.type, enabled=False):  # edges of rounded pictures would be others
        pixels = decode_latents(vae, latents_mean.float() * vae.config.scaling_factor)
        return encode_moments(vae, detector(pixels.clamp(-1, 1)))


class ControlGrid(PromptGrid):
    """Held-out pictures' captions drawn with their conditions, as many as `validation.prompts` has entries.

    Each picture stands beside its condition. Without a held-out split the first samples are taken.
    """

    def __init__(self, config: TrainConfig, device: torch.device, dataset: Any) -> None:
        super().__init__(config, device)
        has_split = config.data.type == "Store" and config.validation.num_samples > 0
        shown = build_training_data(config, split=config.validation.split) if has_split else dataset
        keys = [SampleKey(index, index) for index in range(min(len(self.prompts), len(shown)))]
        samples = [shown[key] for key in keys]
        self.prompts = [shown.caption_of(key) for key in keys]
        length = max(len(sample.caption_embeds) for sample in samples)
        embeds = torch.zeros(len(samples), length, samples[0].caption_embeds.shape[1])
        mask = torch.zeros(len(samples), length, dtype=torch.bool)
        for row, sample in enumerate(samples):
            count = len(sample.caption_embeds)
            embeds[row, :count], mask[row, :count] = sample.caption_embeds.float(), True
        self.captions = embeds.to(device), mask.to(device)
        vae = self.pipeline.vae
        make = None if config.control_condition is None else condition_of_latents(config, device)
        self.conditions = []
        for sample in samples:
            mean = sample.control_mean if make is None else make(sample.latents_mean[None].to(device))[0][0]
            pixels = decode_latents(vae, mean.to(device).float()[None] * vae.config.scaling_factor)[0]
            self.conditions.append(pixels.clamp(-1, 1))

    def draw(self, network: Any) -> Image:
        """A labelled grid of pairs: condition, drawing."""
        training = network.training
        network.eval()
        self.pipeline.controlnet = network
        pictures = self.pictures(network.base_model, control_image=self.conditions)
        self.pipeline.controlnet = None
        network.train(training)
        pairs = [side_by_side(to_pil(condition), picture) for condition, picture in zip(self.conditions, pictures)]
        return labelled_grid(pairs, self.prompts, columns=4)


def side_by_side(left: Image, right: Image) -> Image:
    """Two pictures of one height as one."""
    from PIL import Image

    pair = Image.new("RGB", (left.width + right.width, left.height))
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width, 0))
    return pair
