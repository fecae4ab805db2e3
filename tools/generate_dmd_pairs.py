"""Let a model draw a store's captions from fixed noise: pairs for the regression loss of train_pixart_dmd.py.

python tools/generate_dmd_pairs.py output/features/emoji-256 --out output/features/emoji-pairs
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.config.sampling_cli import BUNDLED
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("store", help="feature store")
    add("--out", required=True, help="folder of the store of pairs")
    add("--pipeline_load_from", default=BUNDLED, help="the teacher's pipeline (default: %(default)s)")
    add("--steps", type=int, default=50, help="DDIM steps (default: %(default)s)")
    add("--cfg_scale", type=float, default=4.5, help="guidance (default: %(default)s)")
    add("--limit", type=int, help="evenly spaced subset of at most this many pictures")
    add("--bs", type=int, default=32, help="pictures at a time (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    args = parser.parse_args()

    from diffusion.devices import choose_device
    from diffusion.inference import PixArtPipeline
    from diffusion.training.one_step import write_pairs

    device = choose_device(args.device)
    pipeline = PixArtPipeline.from_pretrained(args.pipeline_load_from, algorithm="ddim", device=device)
    pipeline.set_progress_bar_config(disable=True)
    count = write_pairs(
        args.store, args.out, pipeline, num_inference_steps=args.steps, guidance_scale=args.cfg_scale,
        limit=args.limit, batch_size=args.bs,
    )  # fmt: skip
    print(f"{args.out}: {count} pairs")


if __name__ == "__main__":
    run_cli(main)
