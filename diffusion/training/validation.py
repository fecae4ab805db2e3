"""Is the model getting better? A loss on fixed draws of held-out samples, and a grid of fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion.config import TrainConfig
from diffusion.data import SampleKey, collate
from diffusion.errors import ConfigError, PromptError
from diffusion.objectives import Objective
from diffusion.ranks import Ranks
from diffusion.training.building import build_training_data

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusion.models import PixArt


class ValidationLoss:
    """Mean loss of the first samples of a held-out split; noise, timesteps and captions never change.

    The samples are shared among the ranks; every rank gets the same mean.
    """

    def __init__(self, config: TrainConfig, objective: Objective, ranks: Ranks) -> None:
        self.ranks, self.seed = ranks, config.validation.seed
        self.objective = objective.for_validation()
        dataset = build_training_data(config, split=config.validation.split)
        count = min(config.validation.num_samples, len(dataset))
        groups: dict[object, list[int]] = {}
        for index in range(count):
            groups.setdefault(dataset.buckets[index], []).append(index)
        size = config.train_batch_size
        batches = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
        rounds = math.ceil(len(batches) / ranks.world_size)
        mine = range(ranks.rank, rounds * ranks.world_size, ranks.world_size)
        # All processes make as many calls, since a sharded teacher is gathered by all of them; what is over counts not.
        self._spare = sum(number >= len(batches) for number in mine)
        chosen = [batches[number] if number < len(batches) else batches[0] for number in mine]
        self.batches = [collate([dataset[SampleKey(index, index)] for index in batch]) for batch in chosen]

    @torch.no_grad()
    def __call__(self, network: PixArt) -> float:
        """Loss of a network, in training's units, without caption dropout."""
        device = self.ranks.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        training = network.training
        network.eval()
        counted = len(self.batches) - self._spare
        for number, batch in enumerate(self.batches):
            output = self.objective.loss(network, batch.to(device), self.seed)
            if number < counted:
                per_sample = sum(output.metrics.values(), torch.zeros((), device=device))
                total += torch.stack([per_sample.double().sum(), total.new_tensor(len(batch.keys))])
        network.train(training)
        loss_sum, count = self.ranks.total(total).tolist()
        return loss_sum / count


class PromptGrid:
    """Pictures of fixed prompts from fixed seeds. The captions are encoded once; T5 is then freed.

    `drawn` says how the last were drawn: prompts, num_inference_steps, guidance_scale, seed.
    """

    def __init__(self, config: TrainConfig, device: torch.device, algorithm: str | None = None) -> None:
        from diffusion.images import load_vae
        from diffusion.inference import PixArtPipeline
        from diffusion.inference.folders import load_scheduler
        from diffusion.inference.solvers import fitting_scheduler
        from diffusion.text import CaptionEncoder

        if config.pipeline_load_from is None:
            raise ConfigError("validation.prompts needs pipeline_load_from: the folder with tokenizer, T5 and VAE")
        self.settings, self.drawn = config.validation, dict[str, Any]()
        self.prompts = read_prompts(config.validation.prompts, config.validation.prompt_file)
        self.image_size = config.image_size
        self.null_caption = config.null_caption
        folder = config.pipeline_load_from  # it may lack a transformer: this run may be making the first
        # Beside a network that trains, T5-XXL in float32 would not fit on most cards.
        encoder = CaptionEncoder.from_pretrained(
            folder,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            max_length=config.model_max_length,
            int8=config.lora is not None and config.lora.base_dtype == "int8",
        )
        vae, scheduler = load_vae(folder, device=device), load_scheduler(folder, algorithm)
        scheduler = fitting_scheduler(scheduler, config.process.prediction_type, config.process.flow_shift)
        if not math.isclose(vae.config.scaling_factor, config.scale_factor, rel_tol=1e-4):
            raise ConfigError(
                f"scale_factor={config.scale_factor} is not that of the VAE in {folder}; set it to "
                f"{vae.config.scaling_factor}"
            )
        self.pipeline = PixArtPipeline(encoder.tokenizer, encoder.model, vae, None, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.captions: tuple[Tensor, Tensor] = self.pipeline.encode_captions(self.prompts)
        self.null = self.pipeline.encode_captions([""])
        self.pipeline.text_encoder = None

    def draw(self, network: PixArt) -> Image:
        """A labelled grid of the prompts."""
        from diffusion.images import labelled_grid

        return labelled_grid(self.pictures(network), self.prompts, columns=4)

    def pictures(self, network: PixArt, **arguments: Any) -> list[Image]:
        """One picture a prompt; `arguments` are further ones of the pipeline's call."""
        training = network.training
        network.eval()
        self.pipeline.transformer = network
        embeds, mask = self.captions
        null_embeds, null_mask = self.null if self.null_caption == "t5_empty" else (None, None)
        settings = {
            "num_inference_steps": self.settings.num_inference_steps,
            "guidance_scale": self.settings.guidance_scale,
            **arguments,
        }
        self.drawn = {"prompts": list(self.prompts), "seed": self.settings.seed}
        self.drawn |= {name: settings[name] for name in ("num_inference_steps", "guidance_scale")}
        pictures = self.pipeline(
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            negative_prompt_embeds=null_embeds,
            negative_prompt_attention_mask=null_mask,
            null_caption=self.null_caption,
            height=self.image_size,
            width=self.image_size,
            seed=[self.settings.seed + index for index in range(len(self.prompts))],
            **settings,
        ).images
        self.pipeline.transformer = None
        network.train(training)
        return pictures


def read_prompts(prompts: Sequence[str], prompt_file: str | None) -> list[str]:
    """Prompts of a config: its list, or the non-empty lines of its file.

    Raises:
        ConfigError: the file is missing or empty.
    """
    from diffusion.inference.batch import read_prompts as read_prompt_file

    if prompt_file is None:
        return list(prompts)
    try:
        return read_prompt_file(prompt_file)
    except PromptError as error:
        raise ConfigError(f"validation.prompt_file={prompt_file!r}: {error}") from error
