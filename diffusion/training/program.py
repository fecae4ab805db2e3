"""What the training programs do with their arguments; they differ in the family alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from diffusion.config import TrainConfig, config_overrides, flag_overrides, load_config
from diffusion.models import model_names
from diffusion.ranks import Ranks
from diffusion.training.adapter_family import family_of
from diffusion.training.family import Family
from diffusion.training.publishing import publish_if_asked, require_account_if_asked
from diffusion.training.reports import Reporting
from diffusion.training.run_log import close_log
from diffusion.training.trainer import Trainer


def train(args: argparse.Namespace, family: Family | None = None, flags: Mapping[str, str] | None = None) -> None:
    """Run a training program: arguments of `train_parser`.

    Args:
        family: None = what the config asks for.
        flags: of the program's own, see `flag_overrides`.
    Raises:
        PixArtError: see `load_config` and `Trainer`.
    """
    own, named = flag_overrides(args, flags or {})
    overrides = [*config_overrides(args), *own]
    train_config(args, load_config(args.config, overrides, choices={"model": model_names}, flags=named), family)


def train_config(
    args: argparse.Namespace, config: TrainConfig, family: Family | None = None, ranks: Ranks | None = None
) -> Path:
    """Train and upload what a config says; the flags say where and how. Returns the run folder."""
    family = family or family_of(config)
    require_account_if_asked(args)
    try:
        return _run(args, config, family, ranks)
    finally:
        close_log()


def _run(args: argparse.Namespace, config: TrainConfig, family: Family, ranks: Ranks | None) -> Path:
    trainer = Trainer(
        config,
        family.objective,
        args.work_dir or config.work_dir,
        resume_from=args.resume_from,
        allow_config_change=args.allow_config_change,
        reporting=Reporting(args.report_to == "tensorboard", args.tracker_project_name, args.loss_report_name),
        ranks=ranks,
        family=family,
    )
    trainer.fit()
    publish_if_asked(args, trainer.work_dir, is_main=trainer.ranks.is_main)
    return trainer.work_dir
