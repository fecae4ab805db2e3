"""What train_scripts/train_diffusers.py does: a config's data and schedule, the network of a diffusers pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusion.config import TrainConfig, config_overrides, load_config
from diffusion.errors import ConfigError
from diffusion.training.building import denoising_objective
from diffusion.training.publishing import publish_if_asked, require_account_if_asked
from diffusion.training.reports import Reporting
from diffusion.training.run_log import LOGGER
from diffusion.training.starting_model import checked_config, model_keys
from diffusion.training.trainer import Trainer

# Drawn during training when the config names none: subject, scene, person, text-like detail, style.
PROMPTS = (
    "a small cactus with a happy face in a desert",
    "a lighthouse on a cliff above a stormy sea",
    "portrait of an old fisherman, soft window light",
    "a wooden shelf full of books and glass bottles",
    "a paper boat on a river, watercolour",
)


def train_diffusers(args: argparse.Namespace) -> Path:
    """Run the program; returns the run folder.

    Raises:
        PixArtError: the config, the model or the features cannot be used.
    """
    config = load_config(args.config, config_overrides(args))
    require_account_if_asked(args)
    model = args.pipeline_load_from or args.load_from or config.load_from or config.pipeline_load_from
    if model is None:
        raise ConfigError("give the model: --pipeline_load_from FOLDER, or its name on the hub")
    trainer = Trainer(
        of_pipeline(config, model),
        denoising_objective,
        args.work_dir or config.work_dir,
        resume_from=args.resume_from,
        allow_config_change=args.allow_config_change,
        reporting=Reporting(args.report_to == "tensorboard", args.tracker_project_name, args.loss_report_name),
    )
    LOGGER.info("the network is that of %s, whatever the config says of it", model)
    trainer.fit()
    publish_if_asked(args, trainer.work_dir, is_main=trainer.ranks.is_main)
    return trainer.work_dir


def of_pipeline(config: TrainConfig, model: str) -> TrainConfig:
    """The config with the network, encoders and latent scale of a pipeline, and with pictures during training.

    Raises:
        CheckpointError: see `model_keys`.
    """
    keys = {**config.model_dump(), **model_keys(model, config.image_size)}
    if not config.validation.prompts and config.validation.prompt_file is None:
        keys["validation"] = {**config.validation.model_dump(), "prompts": PROMPTS}
    return checked_config(keys, lambda path: model)
