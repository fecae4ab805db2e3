"""What the captioning program does with its arguments."""

from __future__ import annotations

import argparse

from diffusion.errors import ConfigError
from diffusion.features.captioning import CAPTIONS, CaptioningSettings, caption_pictures


def run_captioning(args: argparse.Namespace) -> str:
    """Caption as the arguments say; returns the line to print.

    Raises:
        ConfigError: arguments that are out of range. DataError, CheckpointError: see `caption_pictures`.
    """
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("limit", 1), ("temperature", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.instruction is not None and args.prompt != "auto":
        raise ConfigError("--instruction stands for --prompt; give one of them")
    settings = CaptioningSettings(
        args.model_path, args.prompt, args.instruction, args.template, args.temperature, args.seed, args.max_new_tokens
    )
    counts = caption_pictures(
        args.data_root, args.index, args.output, settings, batch_size=args.batch_size, limit=args.limit,
        max_rejected=args.max_rejected, device=args.device, dtype=args.dtype,
    )  # fmt: skip
    remarks = [f"{counts['rejected']} rejected", f"{counts['cut']} cut at {args.max_new_tokens} tokens"]
    return f"{args.output / CAPTIONS}: {counts.get('captions', 0)} captions ({counts['new']} new); {', '.join(remarks)}"
