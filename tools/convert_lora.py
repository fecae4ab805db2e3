"""Write an adapter in another layout: peft, diffusers or comfyui.

python tools/convert_lora.py output/lora/checkpoints/checkpoint-100 output/comfyui --to comfyui
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("lora", help="adapter folder, file or hub id, in any layout")
    add("out", help="folder of the new file")
    add("--to", required=True, help="peft, diffusers or comfyui")
    add("--weight_name", help="of the file in the folder, when it has none of the usual names")
    args = parser.parse_args()

    from diffusion.adapters import read_adapter, write_layout
    from diffusion.errors import ConfigError

    if args.out.endswith(".safetensors"):
        raise ConfigError(f"out={args.out} must be a folder: the file in it gets the name that programs look for")
    print(f"adapter: {write_layout(read_adapter(args.lora, args.weight_name), args.out, args.to)}")


if __name__ == "__main__":
    run_cli(main)
