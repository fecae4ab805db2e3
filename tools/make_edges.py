"""Edges of a picture as a picture, white on black: what `--control_image` and ControlNet training follow.

python tools/make_edges.py photo.jpg --output edges.png
python tools/make_edges.py photo.jpg --detector hed --output edges.png
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.config.sampling_cli import HED
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="picture file")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--detector", choices=("canny", "hed"), default="canny", help="(default: %(default)s)")
    parser.add_argument("--hed_path", "--hed-path", type=Path, default=Path(HED), help="(default: %(default)s)")
    args = parser.parse_args()

    from diffusion.features.conditions import write_edges

    print(f"edges: {write_edges(args.picture, args.output, args.detector, args.hed_path)}")


if __name__ == "__main__":
    run_cli(main)
