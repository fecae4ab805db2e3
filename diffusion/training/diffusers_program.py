"""What train_scripts/train_diffusers.py does: a config's data and schedule, the network of a diffusers pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusion.config import TrainConfig, config_overrides, load_config
from diffusion.errors import ConfigError
from diffusion.ranks import Ranks
from diffusion.training.program import train_config
from diffusion.training.run_log import LOGGER, configure_logging
from diffusion.training.starting_model import checked_config, model_keys

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
    model = args.pipeline_load_from or args.load_from or config.load_from or config.pipeline_load_from
    if model is None:
        raise ConfigError("give the model: --pipeline_load_from FOLDER, or its name on the hub")
    tuned, ranks = of_pipeline(config, model), Ranks()
    configure_logging(None, is_main=ranks.is_main)
    LOGGER.info("the network is that of %s, whatever the config says of it", model)
    return train_config(args, tuned, ranks=ranks)


def of_pipeline(config: TrainConfig, model: str) -> TrainConfig:
    """The config with the network, encoders and latent scale of a pipeline, and with pictures during training.

    Raises:
        CheckpointError: see `model_keys`.
    """
    keys = {**config.model_dump(), **model_keys(model, config.image_size)}
    if not config.validation.prompts and config.validation.prompt_file is None:
        keys["validation"] = {**config.validation.model_dump(), "prompts": PROMPTS}
    return checked_config(keys, lambda path: model)
