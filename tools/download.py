"""Download published PixArt files into output/pretrained_models; files that are here and whole stay as they are.

    python tools/download.py                                             # T5, VAE and the two models of the original
    python tools/download.py --model_names PixArt-Sigma-XL-2-512-MS.pth --only_models
    python tools/download.py --list                                      # every name, licence, address and place

An interrupted download goes on where it stopped. HF_ENDPOINT names a mirror, HF_TOKEN an account.
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_names", nargs="+", metavar="NAME", help="see --list (default: the 512 px and 1024 px alpha files)")
    add("--only_models", action="store_true", help="without T5 (19 GB) and VAE, which come along otherwise")
    add("--output_dir", default="output/pretrained_models", help="folder of the files")
    add("--revision", default="main", help="branch, tag or commit on the hub")
    add("--list", action="store_true", help="show what there is; needs no network")
    args = parser.parse_args()

    from diffusion.checkpoints.download import download, list_published
    from diffusion.checkpoints.published import DEFAULT_NAMES, PARTS_NAMES, find_published

    if args.list:
        print("\n".join(list_published(args.output_dir)))
        return
    names = [*(() if args.only_models else PARTS_NAMES), *(args.model_names or DEFAULT_NAMES)]
    paths = download([find_published(name) for name in dict.fromkeys(names)], args.output_dir, revision=args.revision)
    print(f"{len(paths)} files are complete in {args.output_dir}")


if __name__ == "__main__":
    run_cli(main)
