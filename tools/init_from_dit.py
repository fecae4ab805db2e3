"""Make a PixArt of a class-conditional DiT (PixArt-alpha, Sec. 2.3): at one timestep it predicts what the DiT predicts.

    python tools/init_from_dit.py --dit DiT-XL-2-256x256.pt --output output/recipe/initial

OUTPUT/transformer is a diffusers folder with which the second stage starts (load_from). A config may also name the DiT
itself as load_from; this tool shows the proof and takes another timestep or class.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--dit", required=True, help="public .pt file of DiT, or a checkpoint of a run that trained one")
    add("--output", type=Path, required=True, help="new folder; the network goes to OUTPUT/transformer")
    add("--timestep", type=float, default=500.0, help="where both predict the same (default: %(default)s)")
    add("--class-id", type=int, help="class whose prediction is kept (default: no class)")
    add("--image-size", type=int, help="px of the new network (default: the DiT's)")
    add("--caption-channels", type=int, default=4096, help="width of the text encoder (default: %(default)s)")
    add("--max-length", type=int, default=120, help="caption tokens (default: %(default)s)")
    add("--num-heads", type=int, help="attention heads of a file of another width than DiT-XL/2")
    add("--ema", action="store_true", help="the averaged weights of a run")
    add("--seed", type=int, default=0, help="of the caption's layers, which are new (default: %(default)s)")
    args = parser.parse_args()

    from diffusion.training.dit_start import make_pixart

    made = make_pixart(
        args.dit,
        args.output,
        timestep=args.timestep,
        class_id=args.class_id,
        image_size=args.image_size,
        caption_channels=args.caption_channels,
        max_length=args.max_length,
        num_heads=args.num_heads,
        ema=args.ema,
        seed=args.seed,
    )
    print(f"{args.output}/transformer: {made.describe()}")


if __name__ == "__main__":
    run_cli(main)
