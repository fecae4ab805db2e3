"""Merge LoRAs into a model: a folder that draws with them without knowing of adapters, or feeds another fine-tuning.

python tools/merge_lora.py output/pretrained_models/emoji-256 output/lora --lora_scale 0.8 --out output/merged
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.config.sampling_cli import BUNDLED
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", help="pipeline folder, transformer folder, checkpoint-N, weight file, or a model of the hub")
    add("loras", nargs="+", metavar="lora", help="adapter folder, file or hub id")
    add("--lora_scale", type=float, action="append", default=[], help="strength of each, or of all; absent = 1")
    add("--out", required=True, help="new folder")
    add("--save_dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights in the new folder")
    add("--pipeline_load_from", default=BUNDLED, help="T5 and VAE of a model that has none (default: %(default)s)")
    args = parser.parse_args()

    from diffusion.features.rows import DTYPES
    from diffusion.inference.batch import load_pipeline
    from diffusion.inference.lora import fuse_into

    pipeline = load_pipeline(args.model, args.pipeline_load_from)
    fuse_into(pipeline, args.loras, args.lora_scale)
    pipeline.save_pretrained(args.out, DTYPES[args.save_dtype])
    print(f"merged pipeline: {args.out}")


if __name__ == "__main__":
    run_cli(main)
