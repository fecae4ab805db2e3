"""Join a trained ControlNet branch and its base in one file with the names of the published ControlNets.

    python tools/export_controlnet.py output/controlnet/checkpoints/checkpoint-4000 \\
        --base output/pretrained_models/emoji-256 --output emoji-controlnet.safetensors
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("controlnet", help="checkpoint-N of train_controlnet.py")
    parser.add_argument("--base", required=True, help="the model that it was trained on: folder, weight file or hub id")
    parser.add_argument("--output", type=Path, required=True, help=".pth, or .safetensors")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    args = parser.parse_args()

    from diffusion.checkpoints import load_controlnet, load_transformer, write_control_file

    network = load_controlnet(args.controlnet, load_transformer(args.base), ema=args.ema)
    print(f"written: {write_control_file(network, args.output)}")


if __name__ == "__main__":
    run_cli(main)
