"""Make a whole diffusers pipeline of a transformer's weights alone, with the flags of PixArt-Sigma.

    python tools/convert_diffusers_to_pipeline.py --safetensors_path path/to/diffusion_pytorch_model.safetensors \\
        --image_size 512 --output_folder path/to/pipeline

T5, VAE, tokenizer and scheduler are copied from --pipeline_load_from. No card is needed.
"""

from __future__ import annotations

from diffusion.config.conversion_cli import pipeline_parser
from diffusion.errors import run_cli


def main() -> None:
    args = pipeline_parser(__doc__).parse_args()

    from diffusion.checkpoints.conversion import convert_by_flags

    convert_by_flags(args)


if __name__ == "__main__":
    run_cli(main)
