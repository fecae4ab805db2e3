"""`TrainConfig`: every key a training config may hold, with its default, meaning and unit.

Names and defaults are those of the original's base config, so that its files load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from diffusion.config.schema_data import DataConfig
from diffusion.config.schema_families import FamilyFields
from diffusion.config.schema_kernels import KernelsConfig
from diffusion.config.schema_levers import LeverFields, check_levers
from diffusion.config.schema_lora import LoraConfig
from diffusion.config.schema_parallel import (
    ELEMENTWISE_OPTIMIZERS,
    GradCheckpointingArgs,
    HealthConfig,
    ParallelConfig,
    Strategy,
)
from diffusion.config.schema_parts import (
    AutoLrConfig,
    KvCompressConfig,
    LrScheduleArgs,
    OptimizerConfig,
    PosthocEmaConfig,
    ProcessConfig,
    ResumeConfig,
    ValidationConfig,
)
from diffusion.config.section import Section, rule_error

AspectRatioType = Literal[
    "ASPECT_RATIO_256",
    "ASPECT_RATIO_512",
    "ASPECT_RATIO_1024",
    "ASPECT_RATIO_2048",
    "ASPECT_RATIO_2880",
    "ASPECT_RATIO_256_TEST",
    "ASPECT_RATIO_512_TEST",
    "ASPECT_RATIO_1024_TEST",
    "ASPECT_RATIO_2048_TEST",
    "ASPECT_RATIO_2880_TEST",
]


class DataFields(Section):
    """Data, batches and the latent scale."""

    data_root: str = Field(default="/data/data", description="Folder that a relative data.root is joined to.")
    data: DataConfig = Field(description="The data set.")
    image_size: int = Field(default=256, gt=0, multiple_of=16, description="Picture side in px; latents are /8.")
    train_batch_size: int = Field(default=32, gt=0, description="Samples per process and micro-batch.")
    multi_scale: bool = Field(default=False, description="Batches by aspect-ratio bucket; needs aspect_ratio_type.")
    aspect_ratio_type: AspectRatioType | None = Field(default=None, description="Name of the bucket table.")
    valid_num: int = Field(default=0, ge=0, description="Buckets with fewer samples than this are left out.")
    last_batch: Literal["pad", "drop"] = Field(
        default="pad", description="Samples that do not fill a global batch: fill it up with others, or leave them out."
    )
    num_workers: int = Field(default=4, ge=0, description="Data-loading processes per training process.")
    sample_posterior: bool = Field(
        default=True, description="Latents are sampled from the VAE posterior; else its mean."
    )
    scale_factor: float = Field(
        default=0.18215, gt=0, description="Factor on VAE latents: 0.18215 for SD VAE, 0.13025 for the SDXL VAE."
    )
    vae_pretrained: str = Field(
        default="/cache/pretrained_models/sd-vae-ft-ema",
        description="Folder of the VAE when pictures are encoded online.",
    )


class ModelFields(Section):
    """The network, its caption input and the noise process."""

    model: str = Field(default="PixArt_XL_2", min_length=1, description="Registered model name.")
    hidden_size: int | None = Field(default=None, gt=0, description="Width; None = the registered model's.")
    depth: int | None = Field(default=None, gt=0, description="Number of blocks; None = the registered model's.")
    num_heads: int | None = Field(default=None, gt=0, description="Attention heads; None = the registered model's.")
    caption_channels: int = Field(default=4096, gt=0, description="Width of the caption embeddings.")
    model_max_length: int = Field(default=120, gt=0, description="Longest caption in text tokens.")
    lewei_scale: float = Field(default=1.0, gt=0, description="Position-embedding scale: 1 at 512 px, 2 at 1024 px.")
    pe_interpolation: float = Field(
        default=1.0, gt=0, description="Sigma's name of lewei_scale; both are always equal."
    )
    micro_condition: bool | None = Field(
        default=None, description="Condition on picture size and ratio; None = what the model class does."
    )
    qk_norm: bool = Field(default=False, description="LayerNorm on queries and keys (Sigma).")
    kv_compress: bool = Field(default=False, description="Compress keys and values as kv_compress_config says (Sigma).")
    kv_compress_config: KvCompressConfig = Field(
        default=KvCompressConfig(), description="Read only when kv_compress is True."
    )
    pred_sigma: bool = Field(default=True, description="The network predicts the variance too (twice the channels).")
    learn_sigma: bool = Field(
        default=True, description="Train the predicted variance by the VLB term; read only when pred_sigma is True."
    )
    class_dropout_prob: float = Field(
        default=0.1, ge=0, le=1, description="Probability that a caption is replaced by the null caption in training."
    )
    null_caption: Literal["t5_empty", "stored"] = Field(
        default="stored",
        description="Null caption: T5('') under its own mask, or the model's stored y_embedding under the caption's "
        "mask (the original's).",
    )
    train_sampling_steps: int = Field(default=1000, gt=0, description="Steps of the noise process.")
    process: ProcessConfig = Field(default=ProcessConfig(), description="Noise schedule, timesteps and loss weights.")
    snr_loss: bool = Field(
        default=False, description="The original's switch: regress x0 instead of noise for t <= 249."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_position_scale(cls, values: Any) -> Any:
        """`pe_interpolation` and `lewei_scale` name one number: fill in whichever is missing, refuse two values."""
        if not isinstance(values, Mapping):
            return values
        given = {key: values[key] for key in ("lewei_scale", "pe_interpolation") if values.get(key) is not None}
        if len(given) == 2 and given["lewei_scale"] != given["pe_interpolation"]:
            text = f"contradicts lewei_scale={given['lewei_scale']!r}; they name one number, set it once"
            raise rule_error("pe_interpolation", text)
        if not given:
            return {key: value for key, value in values.items() if key != "pe_interpolation"}
        scale = next(iter(given.values()))
        return {"lewei_scale": scale, **values, "pe_interpolation": scale}


class OptimisationFields(Section):
    """Length of the run, optimiser, precision, EMA."""

    num_epochs: int = Field(default=80, gt=0, description="Passes over the data; max_steps may end the run earlier.")
    max_steps: int | None = Field(default=None, gt=0, description="Optimiser steps of the run; None = num_epochs only.")
    gradient_accumulation_steps: int = Field(default=1, gt=0, description="Micro-batches per optimiser step.")
    gradient_clip: float | None = Field(default=1.0, gt=0, description="Largest global gradient norm; None = no limit.")
    grad_checkpointing: bool = Field(default=False, description="Recompute blocks in backward: less memory, more time.")
    grad_checkpointing_args: GradCheckpointingArgs = Field(
        default=GradCheckpointingArgs(), description="What is recomputed; read only when grad_checkpointing is True."
    )
    fp32_attention: bool = Field(default=False, description="Self-attention in fp32 under mixed precision.")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        default="bf16", description="Autocast precision; weights stay fp32. fp16 scales the loss."
    )
    compile: bool = Field(
        default=False, description="torch.compile the blocks: faster after a slow start; needs a compiler or Triton."
    )
    cuda_graph: bool = Field(
        default=False,
        description="Record each pass on a GPU and launch it as one: small batches are then several times as fast; one "
        "process.",
    )
    deterministic: bool = Field(
        default=False,
        description="GPU kernels that add in one order alone, so that a run can be repeated bit for bit there; slower.",
    )
    kernels: KernelsConfig = Field(default=KernelsConfig(), description="By which kernels the blocks compute.")
    use_fsdp: bool = Field(default=False, description="Shard weights and optimiser over processes (else DDP).")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="How the run is spread over processes.")
    health: HealthConfig = Field(default=HealthConfig(), description="When a run warns, skips a step or stops.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="The optimiser.")
    auto_lr: AutoLrConfig | None = Field(default=AutoLrConfig(), description="Scale lr with the batch; None = do not.")
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_decay_to_constant"] = Field(
        default="constant", description="Learning rate over optimiser steps, after the warm-up."
    )
    lr_schedule_args: LrScheduleArgs = Field(default=LrScheduleArgs(), description="Arguments of lr_schedule.")
    ema_rate: float | None = Field(default=0.9999, ge=0, lt=1, description="EMA decay per step; None = no EMA weights.")
    posthoc_ema: PosthocEmaConfig | None = Field(
        default=None, description="Snapshots from which an average of any length is made after training; None = none."
    )
    lora: LoraConfig | None = Field(
        default=None, description="Train an adapter on the frozen weights of load_from; None = train the network."
    )
    seed: int = Field(default=43, ge=0, description="Every random draw of the run is a function of this seed.")


class RunFields(Section):
    """Where a run starts from, what it writes and how often."""

    work_dir: str = Field(default="/cache/exps/", min_length=1, description="Folder of logs and checkpoints.")
    load_from: str | None = Field(
        default=None, description="Weights to start from: transformer or pipeline folder, checkpoint-N, or .pth."
    )
    resume_from: ResumeConfig = Field(default=ResumeConfig(), description="Checkpoint to continue.")
    pipeline_load_from: str | None = Field(
        default=None, description="diffusers folder whose tokenizer, T5 and VAE draw the validation pictures."
    )
    log_interval: int = Field(default=50, gt=0, description="Optimiser steps between log lines.")
    save_model_epochs: int | None = Field(
        default=1, gt=0, description="Epochs between checkpoints; None = by steps only."
    )
    save_model_steps: int | None = Field(
        default=1_000_000, gt=0, description="Optimiser steps between checkpoints; None = by epochs only."
    )
    checkpoints_total_limit: int | None = Field(
        default=None, ge=2, description="Newest checkpoints kept, at least 2; None = all."
    )
    checkpoints_keep_every: int | None = Field(
        default=None, gt=0, description="Checkpoints at multiples of so many steps are kept whatever the limit."
    )
    save_async: bool = Field(
        default=True, description="Write checkpoints while training goes on, from a copy in host memory."
    )
    max_failed_saves: int = Field(
        default=3, gt=0, description="So many failed saves in a row end the run with exit code 74; 1 = the first does."
    )
    eval_sampling_steps: int = Field(
        default=250,
        gt=0,
        description="Validation interval when pipeline_load_from is set and validation.every_steps not.",
    )
    validation: ValidationConfig = Field(default=ValidationConfig(), description="Validation loss and picture grid.")


class TrainConfig(RunFields, OptimisationFields, LeverFields, ModelFields, DataFields, FamilyFields):
    """A validated training config. Built by `load_config`; immutable."""

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.multi_scale and self.aspect_ratio_type is None:
            raise rule_error("aspect_ratio_type", "must name a table when multi_scale is True, e.g. 'ASPECT_RATIO_512'")
        if self.kv_compress and (
            self.kv_compress_config.sampling is None or not self.kv_compress_config.kv_compress_layer
        ):
            raise rule_error("kv_compress_config", "must set sampling and kv_compress_layer when kv_compress is True")
        if self.lora is not None and self.posthoc_ema is not None:
            raise rule_error("posthoc_ema", "averages whole networks; set ema_rate for an average of the adapter")
        if self.lora is not None and self.kernels.fp8 is not None:
            raise rule_error(
                "kernels.fp8", "is for training whole networks; an adapter trains in mixed_precision alone"
            )
        if self.w_min > self.w_max:
            raise rule_error("w_min", f"must not exceed w_max={self.w_max!r}")
        check_levers(self)
        return self

    @model_validator(mode="after")
    def _parallel_keys_agree(self) -> Self:
        if self.use_fsdp and self.parallel.strategy == "ddp":
            raise rule_error("use_fsdp", "contradicts parallel.strategy='ddp'; leave one of the two out")
        if self.strategy != "ddp" and self.optimizer.type not in ELEMENTWISE_OPTIMIZERS:
            choices = ", ".join(ELEMENTWISE_OPTIMIZERS)
            raise rule_error(
                "optimizer.type",
                f"{self.optimizer.type!r} needs whole matrices, which parallel.strategy={self.strategy!r} does not "
                f"keep; use one of {choices}, or parallel.strategy='ddp'",
            )
        if self.grad_checkpointing_args != GradCheckpointingArgs() and not self.grad_checkpointing:
            raise rule_error("grad_checkpointing_args", "has no effect; set grad_checkpointing=True, or leave it out")
        if self.compile and self.grad_checkpointing and self.grad_checkpointing_args.policy == "selective":
            raise rule_error(
                "compile",
                "chooses by itself what to recompute inside a block; leave grad_checkpointing_args.policy='selective' "
                "out, or set compile=False",
            )
        if self.grad_checkpointing_args.policy == "budget" and not self.compile:
            raise rule_error("grad_checkpointing_args", "policy='budget' is the compiler's choice; set compile=True")
        return self

    @property
    def strategy(self) -> Strategy:
        """How the run is spread over processes."""
        if self.parallel.strategy is not None:
            return self.parallel.strategy
        return "full_shard" if self.use_fsdp else "ddp"

    @property
    def validation_every_steps(self) -> int | None:
        """Optimiser steps between validations, or None when the run does not validate."""
        if self.validation.every_steps is not None:
            return self.validation.every_steps
        return self.eval_sampling_steps if self.pipeline_load_from is not None else None

    def to_json(self) -> str:
        """The resolved config as JSON text; checkpoints and run folders carry this and never Python code."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """Inverse of `to_json`; the text is data and is never executed."""
        return cls.model_validate_json(text)
