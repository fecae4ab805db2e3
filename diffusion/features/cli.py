"""What the extraction programs do with their arguments."""

from __future__ import annotations

import argparse
from dataclasses import fields

from diffusion.errors import ConfigError
from diffusion.features.extract import MAX_REJECTED_SHARE, extract_folder
from diffusion.features.extract_original import OriginalTarget, extract_original
from diffusion.features.sources import Source, open_source
from diffusion.features.stages import ExtractionSettings

_ORIGINAL_SIZE_PX = 512
_LEAST = {"image_size": 8, "max_length": 1, "batch_size": 1, "token_budget": 1, "limit": 1, "decode": 0}


def run_extraction(args: argparse.Namespace) -> str:
    """Extract as the arguments say; returns the line to print.

    Raises:
        ConfigError: arguments that do not fit together. DataError, CheckpointError: see `extract_folder`.
    """
    place = args.source or args.json_path
    if place is None or (args.source and args.json_path):
        raise ConfigError("give the pictures once: as SOURCE, or with --json_path")
    out = getattr(args, "out", None)
    target = OriginalTarget(getattr(args, "t5_save_root", None), getattr(args, "vae_save_root", None))
    into_files = target.captions is not None or target.pictures is not None
    if (out is None) != into_files:
        raise ConfigError(
            "give --out for a feature store, or --t5_save_root / --vae_save_root for the original's files"
        )
    if getattr(args, "condition", None) is not None and out is None:
        raise ConfigError("--condition is stored beside the features; it needs --out")
    if args.image_size is None:
        args.image_size = 256 if out is not None else _ORIGINAL_SIZE_PX
    settings = settings_from(args)
    if out is None:
        return _into_files(args, place, target, settings)
    if args.start_index or args.end_index is not None:
        raise ConfigError("--start_index and --end_index cut the original's layout; a store takes --limit, or torchrun")
    counts = extract_folder(
        place, out, args.pretrained, settings, device=args.device, limit=args.limit, splits=args.split,
        max_rejected=_share(args), prune=args.prune, dataset_root=args.dataset_root, engine=args.engine,
    )  # fmt: skip
    return f"{out}: {counts['pictures']} pictures ({counts['new']} new); " + _remarks(counts, args.max_length)


def settings_from(args: argparse.Namespace) -> ExtractionSettings:
    """The settings that a program's arguments choose; what it has no argument for keeps its default.

    Raises:
        ConfigError: a number out of its range; see also `ExtractionSettings`.
    """
    for name, least in _LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.image_size % 8:
        raise ConfigError(f"--image-size {args.image_size} must be a multiple of 8, the factor of the VAE")
    given = {field.name: getattr(args, field.name) for field in fields(ExtractionSettings) if hasattr(args, field.name)}
    return ExtractionSettings(**given)


def _into_files(args: argparse.Namespace, place: str, target: OriginalTarget, settings: ExtractionSettings) -> str:
    source = open_source(place, args.split, dataset_root=args.dataset_root)
    start, end = args.start_index, len(source.samples) if args.end_index is None else args.end_index
    if not 0 <= start < min(end, len(source.samples)):
        raise ConfigError(f"--start_index {start} and --end_index {end} select none of {len(source.samples)} pictures")
    samples = source.samples[start:end]
    if args.limit is not None:
        samples = samples[: args.limit]
    part = Source(source.place, source.kind, samples, source.rejected)
    counts = extract_original(part, target, args.pretrained, settings, device=args.device, max_rejected=_share(args))
    folders = " and ".join(str(path) for path in (target.captions, target.pictures) if path is not None)
    written = f"{counts['captions']} captions and {counts['pictures']} pictures written"
    return f"{folders}: {written}; " + _remarks(counts, args.max_length)


def _share(args: argparse.Namespace) -> float:
    return MAX_REJECTED_SHARE if args.max_rejected is None else args.max_rejected


def _remarks(counts: dict[str, int], max_length: int) -> str:
    remarks = [f"{counts['rejected']} rejected", f"{counts['captions_cut']} captions cut at {max_length} tokens"]
    if counts["enlarged"]:
        remarks.append(f"{counts['enlarged']} pictures were smaller than their bucket and enlarged")
    if "nodes" in counts:
        remarks.append(f"by {counts['nodes']} nodes")
    for name in ("changed", "pruned"):
        if counts.get(name):
            remarks.append(f"{counts[name]} {name}")
    return ", ".join(remarks)
