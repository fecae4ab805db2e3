"""Draw pictures from prompts.

    python scripts/inference.py --prompt "red apple" --num_images 4 --grid
    python scripts/inference.py --txt_file asset/samples.txt --model_path output/run/checkpoint-2000 --ema
    python scripts/inference.py --prompt "red apple" --image sketch.png --strength 0.6

Each PNG carries its recipe; a call that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from diffusion.config.sampling_cli import sampling_parser
from diffusion.errors import run_cli


def main() -> None:
    args = sampling_parser(__doc__).parse_args()

    from diffusion.inference.program import draw

    draw(args)


if __name__ == "__main__":
    run_cli(main)
