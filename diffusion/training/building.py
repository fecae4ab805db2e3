"""From a validated config to the parts of a run: network, data, objective."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoints import load_weights, materialize_buffers, read_weights
from diffusion.config import TrainConfig
from diffusion.data import OriginalLayout, build_dataset
from diffusion.errors import CheckpointError, ConfigError, DataError
from diffusion.features import check_encoders
from diffusion.models import KVCompression, PixArt, build_model
from diffusion.objectives import DenoisingObjective
from diffusion.process import IDDPM, LogitNormal
from diffusion.training.lora import adapt, base_of_adapter


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of the network that a config asks for."""
    options: dict[str, Any] = {
        "input_size": config.image_size // 8,
        "caption_channels": config.caption_channels,
        "pe_interpolation": config.lewei_scale,
        "model_max_length": config.model_max_length,
        "pred_sigma": config.pred_sigma,
        "qk_norm": config.qk_norm,
    }
    for name in ("hidden_size", "depth", "num_heads", "micro_condition"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    if config.kv_compress:
        settings = config.kv_compress_config
        options["kv_compress"] = KVCompression(
            settings.sampling or "conv", settings.scale_factor, settings.kv_compress_layer
        )
    return options


def build_network(config: TrainConfig, start: str | Path | None = None) -> PixArt:
    """A network with the config's precision and memory options, in float32 on the CPU; or with an adapter to train.

    Args:
        start: a checkpoint of any kind (see `open_checkpoint`) with its weights, loaded strictly and held once; None =
            initial weights from torch's global generator.
    Raises:
        ConfigError: unknown model name, or sizes that do not divide.
        CheckpointError: nothing to read, or every weight that does not fit, listed.
    """
    start = start or base_of_adapter(config)
    with torch.device("meta") if start is not None else contextlib.nullcontext():
        model = build_model(config.model, **model_options(config))
    if start is not None:
        _load_starting_weights(model, start)
    model.enable_gradient_checkpointing(1 if config.grad_checkpointing else 0)
    model.use_fp32_attention(config.fp32_attention)
    if config.lora is not None:
        adapt(model, config)
    return model


def _load_starting_weights(model: PixArt, path: str | Path) -> None:
    """Give a network on the meta device the weights of a file; a null caption that the file lacks is drawn anew."""
    weights = read_weights(path)
    if weights.control:
        raise CheckpointError(f"{path} is a ControlNet; training starts from a transformer")
    load_weights(model, weights.state_dict, path, assign=True)
    has_null_caption = not model.y_embedder.y_embedding.is_meta
    materialize_buffers(model)
    if not has_null_caption:
        model.y_embedder.reset_null_caption()
    model.float()


def build_training_data(config: TrainConfig, split: str | None = None) -> Any:
    """The data set of a config; `split` replaces `data.split` (for validation).

    Raises:
        DataError: missing or damaged features, encoders other than those of `pipeline_load_from`, or captions of
            another width than the network's.
    """
    data = config.data.model_dump()
    if split is not None:
        data["split"] = split
    dataset = build_dataset(
        data,
        image_size=config.image_size,
        aspect_ratio_type=config.aspect_ratio_type if config.multi_scale else None,
        model_max_length=config.model_max_length,
        seed=config.seed,
        data_root=config.data_root,
    )
    # Validation reads another split of the store that training has checked; the encoders need not be hashed again.
    if split is None and config.pipeline_load_from is not None and not isinstance(dataset, OriginalLayout):
        for store in dataset.feature_stores:
            check_encoders(store.root, store.fingerprint, config.pipeline_load_from)
    channels = getattr(dataset, "caption_channels", config.caption_channels)
    if channels != config.caption_channels:
        raise DataError(
            f"data.root={config.data.root}: captions have {channels} channels, the config says "
            f"caption_channels={config.caption_channels}; set it to {channels} or extract with the other text encoder"
        )
    return dataset


def denoising_objective(config: TrainConfig, dataset: Any) -> DenoisingObjective:
    """Base training (IDDPM) as the config describes it.

    Raises:
        ConfigError: a null caption that the data cannot give.
    """
    null_embeds: torch.Tensor | None = None
    if config.null_caption == "t5_empty":
        null_embeds = getattr(dataset, "null_caption", None)
        if null_embeds is None:
            raise ConfigError(
                f"null_caption='t5_empty' needs T5('') beside the features, which data.type={config.data.type!r} does "
                "not store; use null_caption='stored' or extract into a Store"
            )
    if config.snr_loss:
        raise ConfigError("snr_loss=True is not offered (it mixes two losses); use process.min_snr_gamma=5")
    process = config.process
    skewed = process.timestep_sampling == "logit_normal"
    return DenoisingObjective(
        process=IDDPM("", process.noise_schedule, config.train_sampling_steps),
        scale_factor=config.scale_factor,
        class_dropout_prob=config.class_dropout_prob,
        null_embeds=null_embeds,
        sample_latents=config.sample_posterior,
        min_snr_gamma=process.min_snr_gamma,
        learn_variance=config.learn_sigma,
        logit_normal=LogitNormal(process.logit_mean, process.logit_std) if skewed else None,
        noise_offset=process.noise_offset,
    )
