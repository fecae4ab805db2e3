"""Distil a model into a LoRA that makes it draw in 1 to 8 steps without guidance (LCM-LoRA).

The base, which is the teacher too, is what --load-from or the config's load_from names, in resumed runs too. A
checkpoint opens with peft, and holds the files of diffusers and ComfyUI too.
"""

from __future__ import annotations

from diffusion.config import train_parser
from diffusion.errors import run_cli

EXAMPLE = "python train_scripts/train_pixart_lcm_lora.py configs/emoji/emoji_lcm_lora.py --work-dir output/lcm-lora"


def main() -> None:
    parser = train_parser(__doc__, EXAMPLE)
    parser.add_argument("--lora_rank", "--lora-rank", type=int, help="rank of the adapters, instead of the config's")
    args = parser.parse_args()

    from diffusion.training.distillation import LCMLoRA
    from diffusion.training.program import train

    train(args, LCMLoRA(), {"lora_rank": "lora_rank"})


if __name__ == "__main__":
    run_cli(main)
