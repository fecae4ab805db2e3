"""Look at pictures and captions before they are extracted: what is there, what is wrong, what it will cost.

    python tools/check_data.py data/emoji
    python tools/check_data.py photos --image-size 512 --multi-scale --sheet photos.png --json photos.json

Ends with exit code 2 when a picture or caption cannot be used; each is named with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.config.extraction_cli import DEFAULT_PRETRAINED, add_bucket_arguments
from diffusion.errors import EXIT_USER_ERROR, run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", help="pictures with captions; see tools/extract_features.py")
    add = parser.add_argument_group("pictures").add_argument
    add("--dataset_root", type=Path, help="folder that the paths of a JSON list are relative to")
    add("--split", nargs="+", help="only these splits")
    add("--image-size", type=int, default=256, help="px")
    add_bucket_arguments(parser.add_argument_group("aspect-ratio buckets"))
    add = parser.add_argument_group("checks").add_argument
    add("--max-length", type=int, default=120, help="tokens a caption at most")
    add("--pretrained", type=Path, default=DEFAULT_PRETRAINED, help="for tokens, disk use and time")
    add("--decode", type=int, default=512, help="pictures to decode completely")
    add("--all", action="store_true", help="read every header and decode every picture")
    add("--measure", action="store_true", help="load the encoders and time them on a few pictures")
    add("--device", default="auto", help="of the time estimates")
    add = parser.add_argument_group("output").add_argument
    add("--sheet", type=Path, help="write a contact sheet of 24 pictures, cropped as in training")
    add("--json", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    from diffusion.features.cli import settings_from
    from diffusion.features.report import check_source, contact_sheet
    from diffusion.features.sources import open_source

    source = open_source(args.source, args.split, dataset_root=args.dataset_root)
    settings = settings_from(args)
    counts = {"headers": source.total, "decode": source.total} if args.all else {"decode": args.decode}
    report = check_source(source, settings, args.pretrained, measure=args.measure, device=args.device, **counts)
    print("\n".join(report.lines()))
    for path in (args.sheet, args.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.json is not None:
        args.json.write_text(report.to_json(), encoding="utf-8")
    if args.sheet is not None and (sheet := contact_sheet(source.samples, settings)) is not None:
        sheet.save(args.sheet)
        print(f"sheet        {args.sheet}")
    if report.rejected:
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    run_cli(main)
