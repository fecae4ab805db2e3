"""Caption pictures with an image-text model, such as LLaVA: one NAME.txt a picture, and captions.json.

    python tools/VLM_caption_lightning.py --output output/captions --data-root data/data_toy --index data_info.json
    torchrun --nproc-per-node 8 tools/VLM_caption_lightning.py --output captions --data-root photos

Call it again after an interruption: pictures that have their NAME.txt are done. captions.json is a list that
tools/extract_features.py reads: --json_path output/captions/captions.json --dataset_root data/data_toy.
"""

from __future__ import annotations

from diffusion.config.captioning_cli import captioning_parser
from diffusion.errors import run_cli


def main() -> None:
    args = captioning_parser(__doc__).parse_args()

    from diffusion.features.captioning_cli import run_captioning

    print(run_captioning(args))


if __name__ == "__main__":
    run_cli(main)
