"""What `tools/feature_store.py` does with its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from diffusion.features.exchange import export_original, export_webdataset, import_original, import_webdataset
from diffusion.features.maintenance import merge_stores, migrate_store, split_store, summarize, verify_store
from diffusion.features.manifest import FORMAT_VERSION
from diffusion.features.sources import open_source
from diffusion.features.store import FeatureStore


def run_command(args: argparse.Namespace) -> str:
    """Do the command; returns what to print. Raises DataError."""
    commands: dict[str, Callable[[argparse.Namespace], str]] = {
        "info": lambda args: _describe(FeatureStore(args.store)),
        "verify": lambda args: _describe(verify_store(args.store)) + "\nverified: all hashes and features are right",
        "migrate": lambda args: f"{args.store}: format {migrate_store(args.store)} -> {FORMAT_VERSION}",
        "merge": lambda args: f"{args.out}: {merge_stores(args.stores, args.out, prefixes=args.prefixes)} rows",
        "split": _split,
        "export": _export,
        "import": _import,
        "import-webdataset": lambda args: f"{args.out}: {import_webdataset(args.folder, args.out)} rows",
    }
    return commands[args.command](args)


def _describe(store: FeatureStore) -> str:
    summary = summarize(store)
    buckets = sorted(summary.buckets.items(), key=lambda item: -item[1])
    lines = [
        f"{store.root}: {summary.rows} pictures, {summary.captions} captions, {summary.bytes / 1e6:.1f} MB, "
        f"format {summary.format_version}, {store.manifest['dtype']}, {summary.rejected} rejected",
        *(f"  {name}: {value}" for name, value in store.fingerprint.items()),
        *(f"  {width}x{height} px: {count}" for (height, width), count in buckets),
    ]
    return "\n".join(lines)


def _split(args: argparse.Namespace) -> str:
    counts = split_store(args.store, args.out, by=args.by, parts=args.parts)
    return "\n".join(f"{args.out / name}: {count} rows" for name, count in counts.items())


def _export(args: argparse.Namespace) -> str:
    write = export_original if args.to == "original" else export_webdataset
    return f"{args.out}: {write(args.store, args.out)} rows"


def _import(args: argparse.Namespace) -> str:
    source = open_source(args.source, dataset_root=args.dataset_root)
    options = {"image_size": args.image_size, "multi_scale": args.multi_scale}
    return f"{args.out}: {import_original(source, args.features, args.out, **options)} rows"
