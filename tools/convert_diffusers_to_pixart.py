"""Convert a diffusers transformer (or any other checkpoint) back into a file in the original's names.

    python tools/convert_diffusers_to_pixart.py --safetensor_path path/to/diffusers --pth_path path/to/model.pth

--pth_path ending with .safetensors gives a single file with ModelSpec metadata, as ComfyUI reads. A conversion to
diffusers and back gives every tensor bit for bit, the null caption and position table included.
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.config.conversion_cli import DTYPES
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--safetensor_path", required=True, help="diffusers folder, checkpoint-N, safetensors file or hub id")
    add("--pth_path", required=True, help="new file, .pth or .safetensors")
    add("--image_size", type=int, help="training size in px, for a single file that does not tell")
    add("--version", choices=("alpha", "sigma"), help="for files that do not tell")
    add("--ema", action="store_true", help="the averaged weights of a checkpoint-N")
    add("--dtype", choices=DTYPES, help="of the written weights (default: as in the file)")
    args = parser.parse_args()

    import torch

    from diffusion.checkpoints import open_checkpoint
    from diffusion.checkpoints.conversion import write_native

    checkpoint = open_checkpoint(args.safetensor_path, ema=args.ema, image_size=args.image_size, family=args.version)
    path = write_native(checkpoint, args.pth_path, dtype=getattr(torch, args.dtype) if args.dtype else None)
    print(f"found: {checkpoint.found.describe()}\nwritten: {path}")


if __name__ == "__main__":
    run_cli(main)
