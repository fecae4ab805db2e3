"""Check an official PixArt file on your machine and print a text that can be pasted into an issue.

    python tools/verify_official.py output/pretrained_models/PixArt-XL-2-1024-MS.pth
    python tools/verify_official.py PixArt-alpha/PixArt-XL-2-512x512 --pipeline_load_from path/to/pipeline --device cuda

Compared are the recorded numbers of keys, shapes and parameters, and the outputs of this package's network with those
of diffusers; with --pipeline_load_from one picture is drawn. Exit code 2: a check failed.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import CheckpointError, run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("path", help="file, diffusers folder or hub id")
    add("--name", help="the published model it is, when its file name does not say")
    add("--pipeline_load_from", help="pipeline folder with tokenizer, T5 and VAE, for one picture")
    add("--picture", default="output/verified.png", help="where the picture goes")
    add("--device", default="auto", help="cpu, cuda, mps; auto = cuda where there is one, else mps, else cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the picture")
    add("--output", type=Path, help="also write the text to this file")
    args = parser.parse_args()

    import torch

    from diffusion.devices import choose_device
    from diffusion.evaluation.official import verify_official

    report = verify_official(
        args.path,
        name=args.name,
        pipeline=args.pipeline_load_from,
        picture=args.picture,
        device=choose_device(args.device),
        dtype=getattr(torch, args.dtype),
    )
    print(report.text())
    if args.output is not None:
        args.output.write_text(report.text(), encoding="utf-8")
    if report.failures:
        raise CheckpointError(f"{report.failures} checks failed for {args.path}; please paste the text into an issue")


if __name__ == "__main__":
    run_cli(main)
