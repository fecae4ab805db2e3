"""Sections of a training config for many processes: how the run is spread, what is recomputed, when it is stopped."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from diffusion.config.section import Section, rule_error

# Optimisers that treat every weight by itself, and therefore work on a shard of a matrix as on the whole.
ELEMENTWISE_OPTIMIZERS = ("AdamW", "Adam", "SGD", "Lion")

Strategy = Literal["ddp", "full_shard", "shard_grad_op", "hybrid_shard"]


class ParallelConfig(Section):
    """How a run is spread over its processes."""

    strategy: Strategy | None = Field(
        default=None,
        description="ddp: every process holds everything; full_shard: weights, gradients and optimiser are shared "
        "out; shard_grad_op: weights stay whole between forward and backward (faster, more memory); hybrid_shard: "
        "shared out within groups of shard_size. None = full_shard when use_fsdp is True, otherwise ddp.",
    )
    shard_size: int | None = Field(
        default=None, gt=1, description="hybrid_shard: processes that share one copy; None = those of one machine."
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision in which gradients are summed over processes."
    )
    sums_by: Literal["copies", "nccl"] = Field(
        default="copies",
        description="How ddp sums float32 gradients between the GPUs of a host: by copy engines, which leaves the "
        "multiprocessors to the backward pass, or by NCCL.",
    )

    @model_validator(mode="after")
    def _numbers_are_read(self) -> Self:
        if self.shard_size is not None and self.strategy != "hybrid_shard":
            raise rule_error("shard_size", "is read by strategy='hybrid_shard' only; set it, or leave shard_size out")
        return self


class GradCheckpointingArgs(Section):
    """What `grad_checkpointing=True` recomputes in the backward pass."""

    policy: Literal["blocks", "selective", "budget"] = Field(
        default="blocks",
        description="blocks: all inside a block; selective: all but the outputs of matrix products and attention; "
        "budget: what saves `budget` with the least arithmetic (compile=True alone, whose solver chooses).",
    )
    budget: float = Field(
        default=0.5, ge=0, le=1, description="policy='budget': share of what a block would keep, 1 = all of it."
    )
    every: int = Field(default=1, gt=0, description="Apply the policy to every n-th block; the others keep everything.")

    @model_validator(mode="after")
    def _budget_is_read(self) -> Self:
        if self.policy != "budget" and self.budget != type(self).model_fields["budget"].default:
            raise rule_error("budget", "is read by policy='budget' only; set it, or leave budget out")
        if self.policy == "budget" and self.every != 1:
            raise rule_error("every", "is not read by policy='budget', which chooses in every block; leave it out")
        return self


class HealthConfig(Section):
    """When a run warns, skips a step or stops."""

    max_skipped_in_a_row: int = Field(
        default=10,
        gt=0,
        description="Steps with a loss or gradient that is not finite are skipped; so many in a row end the run (77).",
    )
    spike_z: float | None = Field(
        default=6.0, gt=0, description="Robust z-score of loss or gradient norm that is reported; None = never."
    )
    check_equal_every_steps: int | None = Field(
        default=1000, gt=0, description="Steps between checks that processes hold equal weights; None = never."
    )
    hang_timeout_s: float | None = Field(
        default=300.0, gt=0, description="Seconds without progress after which a process is lost (78); None = never."
    )
