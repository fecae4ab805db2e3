"""Look at, check and reshape feature stores.

python tools/feature_store.py info output/features/emoji-256
python tools/feature_store.py verify output/features/emoji-256
python tools/feature_store.py migrate STORE                          # to the present format, in place
python tools/feature_store.py merge STORE STORE --out NEW [--prefixes]
python tools/feature_store.py split STORE --out FOLDER --by split    # or --parts 4
python tools/feature_store.py export STORE --out FOLDER --to original    # or webdataset
python tools/feature_store.py import SOURCE --features FOLDER --out NEW --image-size 256
python tools/feature_store.py import-webdataset FOLDER --out NEW
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("info", "verify"):
        commands.add_parser(name).add_argument("store", help="folder or fsspec URL")
    commands.add_parser("migrate").add_argument("store", type=Path, help="folder, changed in place")
    merge = commands.add_parser("merge")
    merge.add_argument("stores", nargs="+", help="folders or fsspec URLs")
    merge.add_argument("--prefixes", action="store_true", help="put the store's name before its keys")
    split = commands.add_parser("split")
    split.add_argument("store", help="folder or fsspec URL")
    split.add_argument("--by", help="attribute whose values name the stores")
    split.add_argument("--parts", type=int, help="number of stores of consecutive rows")
    export = commands.add_parser("export")
    export.add_argument("store", help="folder or fsspec URL")
    export.add_argument("--to", choices=("original", "webdataset"), required=True, help="layout to write")
    pack = commands.add_parser("import")
    pack.add_argument("source", help="pictures and captions, see tools/extract_features.py")
    pack.add_argument("--features", type=Path, required=True, help="folder of the original's npz and npy files")
    pack.add_argument("--dataset_root", type=Path, help="folder that the paths of a JSON list are relative to")
    pack.add_argument("--image-size", type=int, required=True, help="px of the latents' base")
    pack.add_argument("--multi-scale", action="store_true", help="the latents lie in aspect-ratio buckets")
    tars = commands.add_parser("import-webdataset")
    tars.add_argument("folder", type=Path, help="folder of the tars that export wrote")
    for command in (merge, split, export, pack, tars):
        command.add_argument("--out", type=Path, required=True, help="new folder")
    args = parser.parse_args()

    from diffusion.features.maintenance_cli import run_command

    print(run_command(args))


if __name__ == "__main__":
    run_cli(main)
