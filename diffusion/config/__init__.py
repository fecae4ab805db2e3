"""Config room: Python config files in, frozen typed `TrainConfig` out; the command line of the training scripts."""

from __future__ import annotations

from diffusion.config.cli import config_overrides, flag_overrides, train_parser
from diffusion.config.loader import config_from_json, load_config
from diffusion.config.problems import check_choice
from diffusion.config.reference import describe_keys
from diffusion.config.schema import TrainConfig
from diffusion.config.schema_data import DataConfig
from diffusion.config.schema_parts import (
    AutoLrConfig,
    KvCompressConfig,
    LrScheduleArgs,
    OptimizerConfig,
    ProcessConfig,
    ResumeConfig,
    ValidationConfig,
)
from diffusion.errors import ConfigError, run_cli

__all__ = [
    "AutoLrConfig",
    "ConfigError",
    "DataConfig",
    "KvCompressConfig",
    "LrScheduleArgs",
    "OptimizerConfig",
    "ProcessConfig",
    "ResumeConfig",
    "TrainConfig",
    "ValidationConfig",
    "check_choice",
    "config_from_json",
    "config_overrides",
    "describe_keys",
    "flag_overrides",
    "load_config",
    "run_cli",
    "train_parser",
]
