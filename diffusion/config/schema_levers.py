"""Levers of training that are off by default: classes, token routing, alignment with an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from diffusion.config.section import Section, rule_error

if TYPE_CHECKING:
    from diffusion.config.schema import TrainConfig


class TreadConfig(Section):
    """Token routing (TREAD, arXiv:2501.04765): in training a share of the tokens passes around a span of blocks."""

    share: float = Field(default=0.5, gt=0, lt=1, description="Share of the tokens that pass around the blocks.")
    first_block: int = Field(default=2, ge=0, description="First block that they pass around.")
    last_block: int | None = Field(
        default=None, ge=0, description="Last block that they pass around; None = the last but one of the network."
    )
    until_step: int | None = Field(
        default=None,
        gt=0,
        description="Optimiser step at which routing ends; None = never. A last tenth without is good.",
    )


class RepaConfig(Section):
    """Alignment of hidden tokens with a frozen picture encoder (REPA, arXiv:2410.06940)."""

    features: str = Field(
        min_length=1, description="Folder that tools/extract_alignment.py made of the store's pictures."
    )
    block: int = Field(default=8, ge=1, description="Tokens are compared after so many blocks.")
    weight: float = Field(default=0.5, gt=0, description="Factor of (1 - cosine similarity) in the loss.")
    head_width: int = Field(default=2048, gt=0, description="Hidden width of the projection that is trained with it.")
    until_step: int | None = Field(
        default=None,
        gt=0,
        description="Optimiser step at which alignment ends (HASTE, arXiv:2505.16792); None = never.",
    )


class LeverFields(Section):
    """Classes of the first training stage, and levers towards quality in less time."""

    num_classes: int = Field(default=1000, gt=0, description="Classes of a class-conditional network (DiT_*).")
    tread: TreadConfig | None = Field(default=None, description="Token routing in training; None = off.")
    repa: RepaConfig | None = Field(default=None, description="Alignment with a picture encoder; None = off.")


def check_levers(config: TrainConfig) -> None:
    """Refuse what does not go together."""
    process = config.process
    if process.prediction_type == "flow" and config.pred_sigma:
        raise rule_error(
            "pred_sigma", "must be False with process.prediction_type='flow': straight paths have no variance to learn"
        )
    if process.prediction_type == "flow" and process.min_snr_gamma is not None:
        raise rule_error("process.min_snr_gamma", "has no meaning for prediction_type='flow'; set it to None")
    if process.prediction_type != "flow" and process.flow_shift != 1:
        raise rule_error("process.flow_shift", "is read only with process.prediction_type='flow'; leave it at 1")
    if config.model.startswith("DiT_"):
        _check_dit(config)
        return
    if config.data.class_by is not None:
        raise rule_error("data.class_by", f"is read by class-conditional networks (DiT_*), not by {config.model}")
    if config.num_classes != LeverFields.model_fields["num_classes"].default:
        raise rule_error("num_classes", f"is read by class-conditional networks (DiT_*), not by {config.model}")


def _check_dit(config: TrainConfig) -> None:
    """A DiT knows classes, predicts no flow, and has none of PixArt's options."""
    if config.data.class_by is None:
        raise rule_error(
            "data.class_by", f"must name the attribute that is the class when model is {config.model!r}, e.g. 'concept'"
        )
    wrong = {
        "validation.prompts": bool(config.validation.prompts or config.validation.prompt_file),
        "process.prediction_type": config.process.prediction_type == "flow",
        "tread": config.tread is not None,
        "repa": config.repa is not None,
        "qk_norm": config.qk_norm,
        "kv_compress": config.kv_compress,
        "micro_condition": bool(config.micro_condition),
    }
    for key, given in wrong.items():
        if given:
            raise rule_error(key, f"is not offered for a class-conditional network ({config.model}); leave it out")
