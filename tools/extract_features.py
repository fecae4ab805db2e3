"""Encode captioned pictures into a feature store that training reads.

    python tools/extract_features.py data/emoji --out output/features/emoji-256
    torchrun --nproc-per-node 8 tools/extract_features.py photos --out output/features/photos --image-size 512

SOURCE is a folder of x.jpg beside x.txt, an ImageFolder (metadata.jsonl or .csv), a SAM layout, a JSON list, parquet
files, webdataset tars, or hub:OWNER/NAME. Call it again after an interruption, or when pictures were added: it does
what is missing. With --t5_save_root and --vae_save_root it writes the original's files instead.
"""

from __future__ import annotations

from diffusion.config.extraction_cli import extraction_parser
from diffusion.errors import run_cli


def main() -> None:
    args = extraction_parser(__doc__).parse_args()

    from diffusion.features.cli import run_extraction

    print(run_extraction(args))


if __name__ == "__main__":
    run_cli(main)
