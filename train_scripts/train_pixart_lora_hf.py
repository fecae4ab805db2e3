"""Train a LoRA (or DoRA) for a PixArt model on captioned pictures: a folder, a parquet file or a data set of the hub.

Captions and pictures are encoded once into the run folder. At the end the run folder is the adapter: for peft,
`pipe.load_lora_weights`, and ComfyUI.
"""

from __future__ import annotations

from diffusion.config.lora_cli import parse_lora_args
from diffusion.errors import run_cli


def main() -> None:
    args = parse_lora_args(__doc__)

    from diffusion.training.lora_program import train_lora

    print(f"adapter and model card: {train_lora(args)}")


if __name__ == "__main__":
    run_cli(main)
