"""Encode pictures into the original's layout, one NAME.npy of VAE mean and standard deviation each.

    python tools/extract_img_vae_feature.py --json_path data/data_toy/data_info.json --dataset_root data/data_toy \\
        --img_size 256 --vae_save_root output/original/img_vae_features

Call it again after an interruption. `tools/extract_features.py --out` writes a feature store: smaller and
faster to read.
"""

from __future__ import annotations

from diffusion.config.extraction_cli import extraction_parser
from diffusion.errors import run_cli


def main() -> None:
    args = extraction_parser(__doc__, captions=False).parse_args()

    from diffusion.features.cli import run_extraction

    print(run_extraction(args))


if __name__ == "__main__":
    run_cli(main)
