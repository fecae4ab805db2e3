"""Arguments of the extraction programs: ours, and those that the original's README shows, side by side.

Nothing here imports torch, so --help is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.config.sampling_cli import HED

DEFAULT_PRETRAINED = Path("output/pretrained_models/emoji-256")


def extraction_parser(description: str | None, *, captions: bool = True, pictures: bool = True) -> ArgumentParser:
    """Arguments of a program that extracts captions, pictures or both.

    Args:
        captions, pictures: what the program writes into the original's layout.
    """
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("source", nargs="?", help="pictures with captions: a folder, index, tar, parquet, or hub:OWNER/NAME")
    add = parser.add_argument_group("where").add_argument
    if captions and pictures:
        add(
            "--condition", metavar="hed|canny|FOLDER",
            help="also encode what a ControlNet follows: edges of the pictures, or the pictures of FOLDER that have "
            "their names and sizes (--out only)",
        )  # fmt: skip
        add("--hed_path", "--hed-path", type=Path, default=Path(HED), help="HED weights (default: %(default)s)")
        add("--out", type=Path, help="folder of the feature store")
        add(
            "--engine", choices=("local", "ray"), default="local",
            help="this process (and its peers under torchrun), or a Ray cluster (default: %(default)s)",
        )  # fmt: skip
    add(
        "--pretrained", "--pretrained_models_dir", type=Path, default=DEFAULT_PRETRAINED,
        help="diffusers pipeline folder, or the original's with t5_ckpts and sd-vae-ft-ema (default: %(default)s)",
    )  # fmt: skip
    add = parser.add_argument_group("features").add_argument
    add("--image-size", "--img_size", type=int, help="px (default: 256; 512 into the original's layout)")
    add_bucket_arguments(parser.add_argument_group("aspect-ratio buckets"))
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of storage (default: %(default)s)")
    add("--max-length", "--max_length", type=int, default=120, help="tokens a caption at most (default: %(default)s)")
    add = parser.add_argument_group("batches and pictures").add_argument
    add("--batch-size", "--batch_size", type=int, default=16, help="pictures a VAE call (default: %(default)s)")
    if pictures:
        add("--compile-vae", action="store_true", help="compile the VAE: half a minute at the start, then faster (GPU)")
    add("--token-budget", type=int, default=16384, help="tokens a T5 call (default: %(default)s)")
    add(
        "--small", choices=("enlarge", "reject"), default="enlarge",
        help="pictures smaller than their bucket: enlarge and count, or reject (default: %(default)s)",
    )  # fmt: skip
    add(
        "--max-rejected", type=float,
        help="largest share of unusable pictures; one is always allowed, unless 0 (default: 0.01)",
    )  # fmt: skip
    add("--limit", type=int, help="evenly spaced subset of at most this many pictures")
    add("--split", nargs="+", help="only these splits")
    add("--prune", action="store_true", help="drop rows from the store whose pictures are gone from the source")
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    original = parser.add_argument_group("of the original")
    original.add_argument("--json_path", "--json_file", help="JSON list of path and prompt; the same as SOURCE")
    original.add_argument("--dataset_root", type=Path, help="folder that the paths of a JSON list are relative to")
    original.add_argument("--start_index", type=int, default=0, help="first picture (default: %(default)s)")
    original.add_argument("--end_index", type=int, help="picture to stop before")
    if captions:
        original.add_argument("--t5_save_root", type=Path, help="folder of NAME.npz captions")
    if pictures:
        original.add_argument("--vae_save_root", type=Path, help="folder of NAME.npy latents")
    return parser


def add_bucket_arguments(parser: argparse._ArgumentGroup) -> None:
    """Arguments that say what size a picture is resized and cropped to, beside --image-size."""
    add = parser.add_argument
    add("--multi-scale", "--multi_scale", action="store_true", help="aspect-ratio buckets instead of a square")
    add("--bucket-table", help="bucket table, such as ASPECT_RATIO_512_TEST (default: that of --image-size)")
    add(
        "--bucket-measure", choices=("difference", "log"), default="difference",
        help="nearest bucket by height / width, as the original, or by its logarithm (default: %(default)s)",
    )  # fmt: skip
    add("--transposes", action="store_true", help="add the bucket sizes that the table holds on their side alone")
