"""Command line of train_scripts/train_pixart_lora_hf.py: the original's flags, and what they do here.

Nothing here imports torch, so --help is instant.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from diffusion.config.arguments import ArgumentParser
from diffusion.config.cli import RESUME_FLAGS, add_hub_flags, reporter

_EXAMPLE = """example:
  python train_scripts/train_pixart_lora_hf.py --pretrained_model_name_or_path=PixArt-alpha/PixArt-XL-2-1024-MS \\
      --train_data_dir=FOLDER --preset=lora-12gb --learning_rate=1e-4 --max_train_steps=1000 --output_dir=output/lora"""
# Defaults that a preset changes; flags on the command line win.
PRESETS: dict[str, dict[str, Any]] = {
    "lora-12gb": {
        "resolution": 512,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "rank": 16,
        "learning_rate": 1e-4,
    },
}
PRESETS["lora-8gb"] = {**PRESETS["lora-12gb"], "base_dtype": "int8"}


def lora_parser(description: str | None) -> ArgumentParser:
    """The parser of the LoRA program."""
    parser = ArgumentParser(description=description, epilog=_EXAMPLE)
    _add_model_and_data(parser)
    _add_adapter(parser)
    _add_training(parser)
    _add_results(parser)
    # What other training programs have flags for.
    parser.set_defaults(tracker_project_name="text2image-fine-tune", loss_report_name="loss")
    return parser


def parse_lora_args(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed flags, with the defaults of --preset."""
    parser = lora_parser(description)
    first, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS.get(first.preset, {}))
    args = parser.parse_args(argv)
    if args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return args


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and data").add_argument
    add("--pretrained_model_name_or_path", required=True, help="diffusers pipeline folder, or a model of the hub")
    add("--revision", help="not offered: give the folder of the revision")
    add("--variant", help="not offered: give a folder with the usual files")
    add("--dataset_name", help="data set of the hub, or a local folder or parquet file")
    add("--dataset_config_name", help="configuration of the hub data set")
    add("--train_data_dir", help="folder of captioned pictures, in any layout of docs/data.md")
    add("--image_column", help="column of the pictures; when absent the first of that type")
    add("--caption_column", help="column of the captions; when absent text, caption, prompt and captions")
    add("--max_train_samples", type=int, help="at most so many pictures, evenly spaced")
    text = "largest share of unusable pictures; one is always allowed, unless 0"
    add("--max_rejected", "--max-rejected", type=float, default=0.01, help=text)
    add("--cache_dir", help="where hub data sets are kept, instead of the usual cache")
    add("--resolution", type=int, help="px; when absent the model's own")
    add("--center_crop", action="store_true", help="what is always done: features are encoded once, from the centre")
    add("--random_flip", action="store_true", help="train on mirrored pictures half of the time")
    add("--dataloader_num_workers", type=int, default=0, help="data-loading processes per training process")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adapter").add_argument
    add("--preset", choices=tuple(PRESETS), help="defaults for a card of that size: 512 px, batch 4 in steps of 1, ...")
    add("--rank", type=int, default=4, help="rank of the adapter")
    add("--lora_alpha", type=float, default=8.0, help="strength: the change is scaled by alpha / rank")
    add("--use_dora", action="store_true", help="DoRA: learn the magnitudes of the weights too")
    add("--use_rslora", action="store_true", help="rsLoRA: scale by alpha / sqrt(rank), for high ranks")
    add(
        "--base_dtype",
        default="auto",
        help="of the frozen weights: fp32, bf16, fp16 or int8 (T5 is then in int8 too); auto = of --mixed_precision",
    )
    add("--save_dtype", default="fp32", help="of the adapter's files at the end: fp32, fp16, bf16")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, default=43, help="every random draw of the run is a function of it")
    add("--train_batch_size", type=int, default=16, help="per process")
    add("--num_train_epochs", type=int, default=100, help="passes over the data, where --max_train_steps is absent")
    add("--max_train_steps", type=int, help="optimiser steps, in place of --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimiser step")
    add("--gradient_checkpointing", action="store_true", help="recompute blocks in backward: less memory, more time")
    add("--compile", action="store_true", help="torch.compile the blocks: faster steps after a slow start")
    add("--cuda_graph", action="store_true", help="launch each pass as one recording: several times as fast on a GPU")
    add("--learning_rate", type=float, default=1e-6, help="as in the original, too low for most data: try 1e-4")
    add("--scale_lr", action="store_true", help="multiply the learning rate by batch, accumulation and processes")
    add(
        "--lr_scheduler",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
        default="constant",
        help="schedule",
    )
    add("--lr_warmup_steps", type=int, default=0, help="optimiser steps of warm-up, with any schedule")
    add("--snr_gamma", type=float, help="cap of the min-SNR loss weights (usually 5); when absent none")
    add("--use_8bit_adam", action="store_true", help="not offered: an adapter's moments are a few MB")
    add("--allow_tf32", action="store_true", help="TF32 in float32 products, on cards that have it")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=float, default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=float, default=1.0, help="largest global gradient norm")
    add(
        "--proportion_empty_prompts",
        type=float,
        default=0.1,
        help="captions replaced by the empty one, so that guidance keeps working; the original replaced none",
    )
    kinds = ("epsilon", "v_prediction", "flow")
    add("--prediction_type", choices=kinds, help="what the model predicts; absent: as it says, which this must equal")
    add("--noise_offset", type=float, default=0.0, help="size of noise that is constant over a latent channel")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="autocast precision")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="torch's own attention is as lean")
    add("--local_rank", "--local-rank", type=int, default=-1, help="set by older launchers")


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    folder = "pixart-model-finetuned-lora"
    text = "run folder; the adapter is in it at the end"
    add("--output_dir", "--work-dir", "--work_dir", dest="work_dir", default=folder, help=text)
    add("--logging_dir", help="TensorBoard files are in <output_dir>/logs; another folder is not offered")
    add("--report_to", type=reporter, default="tensorboard", help="tensorboard or none, beside metrics.jsonl")
    add("--checkpointing_steps", type=int, default=500, help="optimiser steps between checkpoints")
    add("--checkpoints_total_limit", type=int, help="newest checkpoints kept, at least 2; when absent all")
    add(*reversed(RESUME_FLAGS), dest="resume_from", help="checkpoint folder, or latest")
    text = "resume although flags or data that change the training are others; they are listed"
    add("--allow_config_change", "--allow-config-change", action="store_true", help=text)
    add("--validation_prompt", help="drawn before, during and after training; when absent nothing is drawn")
    add("--num_validation_images", type=int, default=4, help="pictures of the validation prompt")
    add("--validation_epochs", type=int, default=1, help="epochs between drawings")
    add_hub_flags(parser)
