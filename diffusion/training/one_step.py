"""DMD: a generator that draws in one step, and the pairs of noise and teacher's pictures that it may learn from too."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion.checkpoints import require_fit
from diffusion.checkpoints.tensors import read_tensors
from diffusion.config import TrainConfig
from diffusion.errors import ConfigError, DataError
from diffusion.features import FeatureRow, FeatureStore, FeatureStoreWriter
from diffusion.features.manifest import MANIFEST
from diffusion.images import decode_latents, load_vae
from diffusion.inference import PixArtPipeline
from diffusion.inference.recipe import model_fingerprint
from diffusion.inference.solvers import make_one_step_scheduler
from diffusion.models.lpips import LPIPS
from diffusion.objectives import DistributionMatching, OneStepNetworks, pair_noise
from diffusion.training.building import denoising_objective
from diffusion.training.family import FAKE_SCORE, OnABase
from diffusion.training.optimization import WeightAverage
from diffusion.training.parallel import place_frozen
from diffusion.training.validation import PromptGrid

if TYPE_CHECKING:
    from diffusion.objectives import Objective

PAIRS = "pairs"  # entry of the fingerprint of a store of pairs


class DMD(OnABase):
    """Generator, fake-score network and teacher begin alike.

    A checkpoint holds the generator (`transformer/`, with EMA `transformer_ema/`) and `fake_score/transformer/`, to go
    on.
    """

    base_name = "teacher"

    def objective(self, config: TrainConfig, dataset: Any) -> DistributionMatching:
        if config.process.prediction_type == "flow":
            raise ConfigError(
                "process.prediction_type='flow' is not offered by DMD, whose generator sees noise at a timestep of the "
                "Gaussian process; distil a flow model with train_pixart_lcm.py"
            )
        stores = getattr(dataset, "feature_stores", [])
        if config.regression_weight > 0 and not (stores and PAIRS in stores[0].fingerprint):
            raise ConfigError(
                f"regression_weight={config.regression_weight} needs pairs, which data.root={config.data.root} does "
                "not hold; make them with tools/generate_dmd_pairs.py, or set it to 0"
            )
        if config.lpips_weights is not None and config.regression_weight == 0:
            raise ConfigError("lpips_weights has no effect with regression_weight=0; leave it out")
        return DistributionMatching(
            **vars(denoising_objective(config, dataset)),
            generator_timestep=config.one_step_timestep,
            max_timestep=config.dmd_max_timestep,
            guidance_scale=config.dmd_guidance_scale,
            regression_weight=config.regression_weight,
        )

    def build_network(self, config: TrainConfig, start: str | Path | None, *, resuming: bool) -> OneStepNetworks:
        self.teacher = self.build_teacher(config, start)
        return OneStepNetworks(*(copy.deepcopy(self.teacher).requires_grad_() for _ in range(2)))

    def build_average(self, network: Any, config: TrainConfig) -> WeightAverage | None:
        if config.ema_rate is None:
            return None
        keys = [key for key in network.state_dict() if key.startswith("generator.")]
        return WeightAverage(network, config.ema_rate, keys=keys)

    def connect(self, objective: Objective, network: Any, average: WeightAverage | None, config: TrainConfig) -> None:
        assert isinstance(objective, DistributionMatching)
        objective.teacher = place_frozen(self.teacher, network, config)
        if config.lpips_weights is not None:
            objective.distance = lpips_distance(config, network.device)

    def build_grid(self, config: TrainConfig, device: torch.device, dataset: Any) -> PromptGrid:
        return OneStepGrid(config, device)

    def write(
        self, tensors: Mapping[str, Tensor], network: Any, folder: Path, *, ema: bool, stored_null_caption: bool
    ) -> None:
        null = {"stored_null_caption": stored_null_caption}
        super().write(_part(tensors, "generator"), network.generator, folder, ema=ema, **null)
        if not ema:
            super().write(_part(tensors, "fake"), network.fake, folder / FAKE_SCORE, ema=False, **null)

    def restore(self, network: Any, folder: Path, *, ema: bool) -> None:
        super().restore(network.generator, folder, ema=ema)
        super().restore(network.fake, folder / FAKE_SCORE, ema=False)


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


class OneStepGrid(PromptGrid):
    """The prompts, drawn by the generator in its one step."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.pipeline.scheduler = make_one_step_scheduler(config.one_step_timestep, config.process.prediction_type)

    def pictures(self, network: Any, **arguments: Any) -> Any:
        return super().pictures(network.generator, **{"num_inference_steps": 1, "guidance_scale": 1.0, **arguments})


def lpips_distance(config: TrainConfig, device: torch.device) -> Any:
    """LPIPS between the pictures of two latents.

    Raises:
        CheckpointError: no weights of LPIPS at lpips_weights, or no VAE.
    """
    network = LPIPS()
    tensors = read_tensors(Path(str(config.lpips_weights)))
    kept = {key: tensors[key] for key in tensors if not key.startswith("lins.")}  # the package lists its layers twice
    require_fit(network, kept, str(config.lpips_weights))
    network.load_state_dict(kept)
    vae = load_vae(config.pipeline_load_from or config.vae_pretrained, device=device)
    return partial(_lpips_of_latents, network.to(device).eval().requires_grad_(False), vae)


def _lpips_of_latents(network: LPIPS, vae: Any, drawn: Tensor, teachers: Tensor) -> Tensor:
    # decode_latents is without gradients.
    pixels = vae.decode(drawn / vae.config.scaling_factor).sample
    return network(pixels.float(), decode_latents(vae, teachers))


@torch.no_grad()
def write_pairs(
    root: str | Path,
    out: str | Path,
    pipeline: PixArtPipeline,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    limit: int | None,
    batch_size: int,
) -> int:
    """A store whose latents the pipeline drew from `pair_noise`, under each picture's first caption; returns the rows.

    Raises:
        DataError: no store, or `out` holds one already.
    """
    store = FeatureStore(root)
    if (Path(out) / MANIFEST).exists():
        raise DataError(f"{out} holds a store already; choose another folder")
    how = {"steps": num_inference_steps, "guidance": guidance_scale, "teacher": model_fingerprint(pipeline.transformer)}
    writer = FeatureStoreWriter(
        out, {**store.fingerprint, PAIRS: how}, store.null_caption, dtype=store.manifest["dtype"]
    )
    count = len(store) if limit is None else min(limit, len(store))
    groups: dict[tuple[int, int], list[int]] = {}
    for index in range(count):
        groups.setdefault(store.buckets()[index * len(store) // count], []).append(index * len(store) // count)
    for (height, width), rows in groups.items():
        for start in range(0, len(rows), batch_size):
            batch = [store.row(index) for index in rows[start : start + batch_size]]
            noise = pair_noise([row.key for row in batch], batch[0].latents_mean.shape)
            drawn = pipeline(
                [row.captions[0] for row in batch], latents=noise, height=height, width=width, output_type="latent",
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=0,
            ).images  # fmt: skip
            for row, latents in zip(batch, drawn.cpu() / pipeline.vae.config.scaling_factor):
                writer.add(_pair(row, latents))
    writer.close()
    return writer.num_rows


def _pair(row: FeatureRow, latents: Tensor) -> FeatureRow:
    pair = copy.copy(row)
    pair.latents_mean, pair.latents_std = latents, torch.zeros_like(latents)
    pair.captions, pair.caption_embeds, pair.caption_weights = row.captions[:1], row.caption_embeds[:1], []
    return pair
