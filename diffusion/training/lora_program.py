"""What train_scripts/train_pixart_lora_hf.py does: flags -> features -> the Trainer -> adapter and card."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoints.hub import is_dataset_id
from diffusion.config import TrainConfig
from diffusion.config.problems import KeyPath
from diffusion.errors import ConfigError, DataError
from diffusion.features import ExtractionSettings
from diffusion.features.sources import Columns, Source, open_source
from diffusion.inference.folders import pipeline_folder
from diffusion.ranks import Ranks
from diffusion.training.program import train_config
from diffusion.training.publishing import require_account_if_asked
from diffusion.training.run_features import extract_for_run
from diffusion.training.run_log import LOGGER, configure_logging
from diffusion.training.starting_model import checked_config, model_keys, require_multiple_of_16
from diffusion.training.work_dir import require_startable

# Data sets that the hub took down: their pictures' owner asked for it.
_WITHDRAWN = ("lambdalabs/pokemon-blip-captions", "svjack/pokemon-blip-captions-en-zh")
_SUBSTITUTE = "lambdalabs/naruto-blip-captions"
_NO_EPOCHS = 10**9  # --max_train_steps counts alone
_FLAGS = {
    "lora.rank": "rank",
    "lora.alpha": "lora_alpha",
    "lora.use_dora": "use_dora",
    "lora.base_dtype": "base_dtype",
    "lora.save_dtype": "save_dtype",
    "optimizer.lr": "learning_rate",
    "optimizer.betas": "adam_beta1, --adam_beta2",
    "optimizer.weight_decay": "adam_weight_decay",
    "optimizer.eps": "adam_epsilon",
    "max_steps": "max_train_steps",
    "num_epochs": "num_train_epochs",
    "gradient_clip": "max_grad_norm",
    "save_model_steps": "checkpointing_steps",
    "class_dropout_prob": "proportion_empty_prompts",
    "process.min_snr_gamma": "snr_gamma",
    "process.noise_offset": "noise_offset",
    "lr_schedule_args.num_warmup_steps": "lr_warmup_steps",
    "num_workers": "dataloader_num_workers",
    "image_size": "resolution",
}


def train_lora(args: argparse.Namespace) -> Path:
    """Run the LoRA program; returns the run folder with the adapter.

    Raises:
        PixArtError: a flag, the model or the data cannot be used; said before any model is loaded where possible.
    """
    _refuse(args)
    out = Path(args.work_dir)
    require_account_if_asked(args)
    ranks = Ranks()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if ranks.is_main:
        require_startable(out, args.resume_from)
        out.mkdir(parents=True, exist_ok=True)
    configure_logging(out, is_main=ranks.is_main)
    _notice(args)
    base = model_keys(args.pretrained_model_name_or_path, args.resolution)
    if args.prediction_type not in (None, base["process"]["prediction_type"]):
        raise ConfigError(
            f"--prediction_type {args.prediction_type}: {args.pretrained_model_name_or_path} predicts "
            f"{base['process']['prediction_type']}; leave the flag out"
        )
    lora_config(args, base, {}, steps_per_epoch=1)  # wrong flags are said before the features are made
    source = _source(args)
    data = _features(args, base, source, out, ranks)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    count = min(len(source.samples), args.max_train_samples or len(source.samples))
    config = lora_config(args, base, data, steps_per_epoch=math.ceil(count / per_step), world_size=ranks.world_size)
    return train_config(args, config, ranks=ranks)


def lora_config(
    args: argparse.Namespace,
    base: dict[str, Any],
    data: dict[str, Any],
    *,
    steps_per_epoch: int,
    world_size: int = 1,
) -> TrainConfig:
    """The training config that the flags ask for.

    Args:
        base: keys of the model, see `model_keys`; data: of the `data` section.
    Raises:
        ConfigError: a flag outside its range, by its name.
    """
    scale = args.gradient_accumulation_steps * args.train_batch_size * world_size if args.scale_lr else 1
    prompts = [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []
    keys = {
        **base,
        "data_root": "/",
        "data": {"type": "Store", "root": "features", **data},
        "work_dir": args.work_dir,
        "train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_workers": args.dataloader_num_workers,
        "num_epochs": args.num_train_epochs if args.max_train_steps is None else _NO_EPOCHS,
        "max_steps": args.max_train_steps,
        "mixed_precision": args.mixed_precision,
        "grad_checkpointing": args.gradient_checkpointing,
        "compile": args.compile,
        "cuda_graph": args.cuda_graph,
        "gradient_clip": args.max_grad_norm,
        "class_dropout_prob": args.proportion_empty_prompts,
        "process": {**base["process"], "min_snr_gamma": args.snr_gamma, "noise_offset": args.noise_offset},
        "optimizer": {
            "type": "AdamW",
            "lr": args.learning_rate * scale,
            "betas": (args.adam_beta1, args.adam_beta2),
            "weight_decay": args.adam_weight_decay,
            "eps": args.adam_epsilon,
        },
        "auto_lr": None,
        "lr_schedule": "constant" if args.lr_scheduler == "constant_with_warmup" else args.lr_scheduler,
        "lr_schedule_args": {"num_warmup_steps": args.lr_warmup_steps},
        "ema_rate": None,
        "lora": {
            "rank": args.rank,
            "alpha": args.lora_alpha,
            "use_dora": args.use_dora,
            "use_rslora": args.use_rslora,
            "base_dtype": args.base_dtype,
            "save_dtype": args.save_dtype,
        },
        "seed": args.seed,
        "log_interval": 10,
        "save_model_epochs": None,
        "save_model_steps": args.checkpointing_steps,
        "checkpoints_total_limit": args.checkpoints_total_limit,
        "validation": {
            "every_steps": max(args.validation_epochs * steps_per_epoch, 1) if prompts else None,
            "prompts": prompts,
            "num_samples": 0,
        },
    }
    return checked_config(keys, _flag_of)


def _flag_of(path: KeyPath) -> str:
    return f"--{_FLAGS.get('.'.join(path), path[-1])}"


def _refuse(args: argparse.Namespace) -> None:
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ConfigError("give the pictures once: --train_data_dir FOLDER, or --dataset_name of the hub")
    given = {
        "revision": "give the downloaded folder of that revision",
        "variant": "give a folder with the usual files",
        "use_8bit_adam": "an adapter's moments are a few MB in float32",
    }
    for name, remedy in given.items():
        if getattr(args, name):
            raise ConfigError(f"--{name} is not offered: {remedy}")
    if args.logging_dir not in (None, "logs"):
        raise ConfigError(f"--logging_dir {args.logging_dir} is not offered; events are in --output_dir/logs")
    for name in ("train_batch_size", "gradient_accumulation_steps", "validation_epochs", "num_validation_images"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise ConfigError(f"--max_train_samples {args.max_train_samples} must be at least 1")
    if args.dataset_config_name is not None and args.dataset_name is None:
        raise ConfigError("--dataset_config_name belongs to --dataset_name, which is not given")
    require_multiple_of_16(args.resolution, "--resolution")


def _notice(args: argparse.Namespace) -> None:
    if not args.center_crop:
        LOGGER.info("pictures are cropped in the centre, as with --center_crop: their features are made once")
    if args.enable_xformers_memory_efficient_attention:
        LOGGER.info("--enable_xformers_memory_efficient_attention: torch's own attention is used, which is as lean")


def _source(args: argparse.Namespace) -> Source:
    """The pictures. Raises DataError: nothing there, or not as the flags say."""
    if args.cache_dir is not None:
        os.environ["HF_DATASETS_CACHE"] = args.cache_dir
    columns = Columns(args.image_column, args.caption_column)
    place = args.train_data_dir or args.dataset_name
    if args.train_data_dir is None and is_dataset_id(place):
        place = f"hub:{place}" + (f"@{args.dataset_config_name}" if args.dataset_config_name else "")
    if args.dataset_name in _WITHDRAWN and place.startswith("hub:"):
        raise DataError(
            f"--dataset_name {args.dataset_name} was withdrawn from the hub at the request of the pictures' owner; "
            f"use {_SUBSTITUTE}, which has the same columns, or your own pictures with --train_data_dir"
        )
    return open_source(place, columns=columns)


def _features(
    args: argparse.Namespace, base: dict[str, Any], source: Source, out: Path, ranks: Ranks
) -> dict[str, Any]:
    """Features of the pictures, and with --random_flip of their mirror images; keys of the `data` section."""
    settings = ExtractionSettings(
        image_size=base["image_size"],
        max_length=base["model_max_length"],
        int8_text=args.base_dtype == "int8",
        batch_size=min(args.train_batch_size, 8),
    )
    folder = pipeline_folder(args.pretrained_model_name_or_path)
    return extract_for_run(
        source, out, folder, settings, ranks,
        limit=args.max_train_samples, flips=args.random_flip, max_rejected=args.max_rejected,
    )  # fmt: skip
