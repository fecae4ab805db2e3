"""Draw pictures in few steps with a model distilled for it (LCM, arXiv:2310.04378).

python scripts/inference_lcm.py --model_path output/pretrained_models/PixArt-LCM-XL-2-1024-MS --sample_steps 4

Everything else is as with scripts/inference.py.
"""

from __future__ import annotations

from diffusion.config.sampling_cli import sampling_parser
from diffusion.errors import run_cli


def main() -> None:
    args = sampling_parser(__doc__, lcm=True).parse_args()

    from diffusion.inference.program import draw

    draw(args)


if __name__ == "__main__":
    run_cli(main)
