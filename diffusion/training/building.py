"""From a validated config to the parts of a run: network, data, objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion.config import TrainConfig
from diffusion.data import OriginalLayout, build_dataset
from diffusion.errors import ConfigError, DataError
from diffusion.features import check_encoders
from diffusion.models import KVCompression, is_class_conditional
from diffusion.objectives import DenoisingObjective
from diffusion.process import IDDPM, LogitNormal
from diffusion.training.levers import alignment_head, objective_kind, prepare_for_levers
from diffusion.training.lora import adapt, base_of_adapter
from diffusion.training.starting import new_network, started_network


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of the network that a config asks for."""
    if is_class_conditional(config.model):
        return dit_options(config)
    options: dict[str, Any] = {
        "input_size": config.image_size // 8,
        "caption_channels": config.caption_channels,
        "pe_interpolation": config.lewei_scale,
        "model_max_length": config.model_max_length,
        "pred_sigma": config.pred_sigma,
        "qk_norm": config.qk_norm,
        "prediction_type": config.process.prediction_type,
        "flow_shift": config.process.flow_shift,
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


def dit_options(config: TrainConfig) -> dict[str, Any]:
    """The same for a class-conditional network."""
    sizes = {name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads")}
    return {
        "input_size": config.image_size // 8,
        "pe_interpolation": config.lewei_scale,
        "pred_sigma": config.pred_sigma,
        "prediction_type": config.process.prediction_type,
        "num_classes": config.num_classes,
        **{name: value for name, value in sizes.items() if value is not None},
    }


def build_network(config: TrainConfig, start: str | Path | None = None) -> Any:
    """A network with the config's precision and memory options, in float32 on the CPU; or with an adapter to train.

    Args:
        start: a checkpoint of any kind, see `started_network`; None = initial weights from torch's global generator.
    Returns:
        `PixArt`, or for DiT_* models `DiT`.
    Raises:
        ConfigError: unknown model name, or sizes that do not divide.
        CheckpointError: nothing to read, or every weight that does not fit, listed.
    """
    start = start or base_of_adapter(config)
    options, head = model_options(config), alignment_head(config)
    if start is None:
        model = new_network(config.model, options, head)
    else:
        model = started_network(config.model, options, start, head)
    recomputing = config.grad_checkpointing_args
    by_block = config.grad_checkpointing and recomputing.policy != "budget"  # which is the compiler's
    every = recomputing.every if by_block else 0
    model.enable_gradient_checkpointing(every, selective=recomputing.policy == "selective")
    model.use_fp32_attention(config.fp32_attention)
    if config.lora is not None:
        adapt(model, config)
    return model


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
        train_ratio=config.train_ratio,
    )
    # Validation reads another split of the store that training has checked; the encoders need not be hashed again.
    if split is None and config.pipeline_load_from is not None and not isinstance(dataset, OriginalLayout):
        for store in dataset.feature_stores:
            check_encoders(store.root, store.fingerprint, config.pipeline_load_from)
    prepare_for_levers(config, dataset)
    channels = getattr(dataset, "caption_channels", config.caption_channels)
    if channels != config.caption_channels:
        raise DataError(
            f"data.root={config.data.root}: captions have {channels} channels, the config says "
            f"caption_channels={config.caption_channels}; set it to {channels} or extract with the other text encoder"
        )
    return dataset


def denoising_objective(config: TrainConfig, dataset: Any) -> DenoisingObjective:
    """Base training as the config describes it: noise, velocity or flow, for captions or classes.

    Raises:
        ConfigError: a null caption that the data cannot give.
    """
    null_embeds: torch.Tensor | None = None
    if config.null_caption == "t5_empty" and not is_class_conditional(config.model):
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
    kind, options = objective_kind(config)
    return kind(
        process=IDDPM("", process.noise_schedule, config.train_sampling_steps),
        scale_factor=config.scale_factor,
        class_dropout_prob=config.class_dropout_prob,
        null_embeds=null_embeds,
        sample_latents=config.sample_posterior,
        min_snr_gamma=process.min_snr_gamma,
        learn_variance=config.learn_sigma,
        logit_normal=LogitNormal(process.logit_mean, process.logit_std) if skewed else None,
        noise_offset=process.noise_offset,
        caption_length=config.model_max_length if config.compile else None,
        prediction_type=process.prediction_type,
        flow_shift=process.flow_shift,
        **options,
    )
