"""Nested sections of a training config: optimiser, schedule, averages, noise process, validation, resume, ..."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator
from typing_extensions import Self

from diffusion.config.section import FloatPair, Floats, Integers, Section, Strings, rule_error

OptimizerType = Literal["AdamW", "Adam", "SGD", "Muon", "Lion", "CAME", "Prodigy", "AdamW8bit"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerType)
_READERS = {
    "eps": ("AdamW", "Adam", "Muon", "CAME", "Prodigy", "AdamW8bit"),
    "betas": ("AdamW", "Adam", "Muon", "Lion", "CAME", "Prodigy", "AdamW8bit"),
    "momentum": ("SGD", "Muon"),
}


class OptimizerConfig(Section):
    """The optimiser: a class of torch.optim (AdamW, Adam, SGD) or of pytorch-optimizer.

    Muon makes the update of every matrix in a block orthogonal, scaled to AdamW's size, and leaves all other weights to
    AdamW with the same learning rate. AdamW8bit keeps its moments in 8 bits (arXiv:2110.02861): torchao's (extra
    `lowbit`), or bitsandbytes'.
    """

    type: OptimizerType = Field(default="AdamW", description=f"One of {', '.join(OPTIMIZERS)}.")
    lr: float = Field(default=1e-4, gt=0, description="Learning rate before auto_lr scales it; Prodigy wants 1.")
    weight_decay: float = Field(default=3e-2, ge=0, description="Weight decay: decoupled, or an L2 term (Adam, SGD).")
    weight_decay_patterns: dict[str, float] = Field(
        default={},
        description="Weight decay of the weights whose name a pattern matches (* stands for anything), the first that "
        "does, instead of the rule that matrices and kernels decay alone: {'*.mlp.*': 0.1, 'blocks.*': 0.05}.",
    )
    eps: float | FloatPair | None = Field(
        default=None,
        description="Added to a denominator; None = 1e-10 (Adam, AdamW, Muon's AdamW), 1e-8 (Prodigy, AdamW8bit), "
        "(1e-30, 1e-16) (CAME, which takes two).",
    )
    betas: Floats | None = Field(
        default=None,
        description="Decay rates of the moments, in [0, 1); None = (0.9, 0.999), (0.9, 0.99) (Lion), "
        "(0.9, 0.999, 0.9999) (CAME, which takes three).",
    )
    momentum: float | None = Field(
        default=None, ge=0, lt=1, description="SGD, Muon: momentum in [0, 1); None = 0 (SGD), 0.95 (Muon)."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_of_sigma(cls, values: Any) -> Any:
        """PixArt-Sigma's configs say CAMEWrapper."""
        if isinstance(values, dict) and values.get("type") == "CAMEWrapper":
            return {**values, "type": "CAME"}
        return values

    @model_validator(mode="after")
    def _numbers_fit_the_type(self) -> Self:
        for key, readers in _READERS.items():
            if getattr(self, key) is not None and self.type not in readers:
                raise rule_error(
                    key,
                    f"is not read by {self.type}; leave it out (in an inherited section: optimizer=dict(_delete_=True, "
                    "type=..., lr=...))",
                )
        negative = [name for name, decay in self.weight_decay_patterns.items() if decay < 0]
        if negative:
            raise rule_error("weight_decay_patterns", f"must be 0 or more, which that of {negative[0]!r} is not")
        count = 3 if self.type == "CAME" else 2
        if self.betas is not None and (len(self.betas) != count or not all(0 <= beta < 1 for beta in self.betas)):
            usual = (0.9, 0.999, 0.9999)[:count]
            raise rule_error("betas", f"must be {count} numbers in [0, 1) for {self.type}; usual values are {usual}")
        values = self.eps if isinstance(self.eps, tuple) else (self.eps,)
        if self.eps is not None and (len(values) != count - 1 or any(value is None or value <= 0 for value in values)):
            kind = "two numbers" if self.type == "CAME" else "one number"
            raise rule_error("eps", f"must be {kind} above 0 for {self.type}; leave it out for the usual value")
        return self


class AutoLrConfig(Section):
    """Scaling of the learning rate with the batch: reference batch 256."""

    rule: Literal["sqrt", "linear"] = Field(
        default="sqrt", description="lr is multiplied by sqrt(global batch / 256), or by global batch / 256."
    )


class LrScheduleArgs(Section):
    """Arguments of lr_schedule."""

    num_warmup_steps: int = Field(
        default=500, ge=0, description="Optimiser steps over which the learning rate rises linearly from 0."
    )


class ProcessConfig(Section):
    """The noise process and the loss weight per timestep."""

    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = Field(
        default="linear", description="Beta schedule; all published PixArt models use 'linear'."
    )
    prediction_type: Literal["epsilon", "v_prediction", "flow"] = Field(
        default="epsilon",
        description="What the network predicts: noise, velocity (arXiv:2202.00512), or noise - latents along straight "
        "paths (rectified flow, arXiv:2403.03206). Checkpoints of one kind do not start runs of another.",
    )
    flow_shift: float = Field(
        default=1.0, gt=0, description="flow: noise levels s become shift * s / (1 + (shift - 1) * s); 3 at 1024 px."
    )
    min_snr_gamma: float | None = Field(
        default=None, gt=0, description="Cap of the min-SNR loss weight (usually 5); None = no weighting."
    )
    noise_offset: float = Field(
        default=0.0, ge=0, description="Size of added noise that is constant over a latent channel."
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="Density of the training timesteps; validation always draws uniformly."
    )
    logit_mean: float = Field(
        default=0.0, description="logit_normal: mean of logit(t / T); below 0 less noise, above 0 more."
    )
    logit_std: float = Field(default=1.0, gt=0, description="logit_normal: standard deviation of logit(t / T).")

    @model_validator(mode="after")
    def _logit_is_read(self) -> Self:
        for key in ("logit_mean", "logit_std"):
            if self.timestep_sampling == "uniform" and getattr(self, key) != type(self).model_fields[key].default:
                raise rule_error(key, "has no effect here; set process.timestep_sampling='logit_normal', or leave it")
        return self


class PosthocEmaConfig(Section):
    """Averages whose length is chosen after training (arXiv:2312.02696); see tools/posthoc_ema.py."""

    sigma_rels: Floats = Field(
        default=(0.05, 0.10), description="Lengths of the averages that are kept, as a share of the training time."
    )
    snapshot_every_steps: int = Field(
        gt=0, description="Optimiser steps between snapshots; 20 or more in a run give averages within 1 %."
    )
    dtype: Literal["fp16", "fp32"] = Field(default="fp16", description="Precision of the snapshot files.")

    @model_validator(mode="after")
    def _lengths_are_possible(self) -> Self:
        lengths = self.sigma_rels
        if not lengths or len(set(lengths)) < len(lengths) or not all(0 < length < 12**-0.5 for length in lengths):
            raise rule_error("sigma_rels", "must be different numbers between 0 and 0.288, such as (0.05, 0.1)")
        return self


class ValidationConfig(Section):
    """Validation: loss on fixed noise and timesteps of held-out samples, and a grid of fixed prompts."""

    every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Optimiser steps between validations; None = eval_sampling_steps when pipeline_load_from is set, "
        "otherwise no validation.",
    )
    at_start: bool = Field(default=True, description="Validate before the first step too (when validation is on).")
    split: str = Field(default="heldout", description="Split of a Store data set for the validation loss.")
    num_samples: int = Field(default=64, ge=0, description="Samples in the validation loss; 0 = no validation loss.")
    prompts: Strings = Field(default=(), description="Captions of the grid; none and no prompt_file = no grid.")
    prompt_file: str | None = Field(default=None, description="Text file with one caption a line, instead of prompts.")
    num_inference_steps: int = Field(default=20, gt=0, description="Solver steps of the grid pictures.")
    guidance_scale: float = Field(default=4.5, ge=1, description="Classifier-free guidance of the grid; 1 = none.")
    seed: int = Field(default=0, ge=0, description="Seed of the noise and timesteps of validation.")

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> Self:
        if self.prompts and self.prompt_file is not None:
            raise rule_error("prompt_file", "cannot be combined with validation.prompts; set one of the two to None/[]")
        return self


class ResumeConfig(Section):
    """What to continue from."""

    checkpoint: str | None = Field(
        default=None, description="Checkpoint folder, or 'latest' of the work_dir; None = start a new run."
    )
    load_ema: bool = Field(default=False, description="Start the trained weights from the checkpoint's EMA weights.")
    resume_optimizer: bool = Field(default=True, description="Restore the optimiser's moments.")
    resume_lr_scheduler: bool = Field(default=True, description="Restore the position in the learning-rate schedule.")


class KvCompressConfig(Section):
    """Key/value compression of PixArt-Sigma's self-attention."""

    sampling: Literal["conv", "ave", "uniform", "uniform_every"] | None = Field(
        default=None, description="How keys and values are downsampled on the token grid; None = not at all."
    )
    scale_factor: int = Field(default=1, ge=1, description="Downsampling factor along each axis of the grid.")
    kv_compress_layer: Integers = Field(default=(), description="Indices of the blocks that compress.")
