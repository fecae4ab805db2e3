"""Families by the names under which runs write them down."""

from __future__ import annotations

from diffusion.config import TrainConfig
from diffusion.errors import CheckpointError, did_you_mean
from diffusion.training.adapter_family import AdapterFamily, family_of
from diffusion.training.family import Family


def family_named(name: str | None, config: TrainConfig) -> Family:
    """The family of a run, from its name (`type(family).__name__`) and config; None = what the config alone asks for.

    Raises:
        CheckpointError: unknown name.
    """
    from diffusion.training.control import ControlNet
    from diffusion.training.distillation import LCM, LCMLoRA
    from diffusion.training.one_step import DMD

    families: dict[str, type[Family]] = {kind.__name__: kind for kind in (ControlNet, LCM, LCMLoRA, DMD)}
    by_config = {Family.__name__, AdapterFamily.__name__}
    if name is None or name in by_config:
        return family_of(config)
    if name not in families:
        raise CheckpointError(f"family {name!r} is unknown; {did_you_mean(name, [*families, *by_config])}")
    return families[name]()
