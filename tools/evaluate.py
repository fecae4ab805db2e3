"""Measure a model.

    python tools/evaluate.py retrieval output/pretrained_models/emoji-256 --limit 64
    python tools/evaluate.py fidelity --generated DIR --reference DIR --weights FILE --output FILE.json
    python tools/evaluate.py clip --pictures DIR --model FOLDER --output FILE.json

`retrieval` draws captions of a data set and asks which of its pictures each drawing shows; see docs/bundled-model.md.
`fidelity` (FID, KID) and `clip` (CLIP score) measure folders of pictures; see docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli

BUNDLED = "output/pretrained_models/emoji-256"


def build_parser() -> ArgumentParser:
    """Command-line arguments; importing this needs no torch."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    retrieval = commands.add_parser("retrieval", help="which real picture each drawing shows")
    add = retrieval.add_argument_group("model").add_argument
    add("model", nargs="?", default=BUNDLED, help="pipeline folder, or a checkpoint-N of a run")
    add("--pipeline_load_from", default=BUNDLED, help="tokenizer, T5 and VAE for a checkpoint that has none")
    add("--ema", action="store_true", help="the averaged weights of a checkpoint")
    add = retrieval.add_argument_group("data").add_argument
    add("--data", default="data/emoji", help="ImageFolder with concepts, splits and duplicate groups")
    add("--split", nargs="*", default=["heldout"], help="splits whose captions are drawn")
    add("--caption", nargs="+", default=["label"], help="'label', 'label with keywords', 'a 3D emoji of'")
    add("--free_prompts", help="JSON lines of prompts with accepted concepts, e.g. data/emoji/free_prompts.jsonl")
    add("--limit", type=int, help="evenly spaced captions a split; all when absent")
    add = retrieval.add_argument_group("sampling").add_argument
    add("--steps", type=int, nargs="+", default=[20], help="solver steps; several give a row each")
    add("--guidance", type=float, nargs="+", help="guidance scales; several give a row each; the model's when absent")
    add(
        "--solver", nargs="+", default=["dpm-solver"],
        help="dpm-solver, sa-solver, iddpm, ddim, deis, lcm; several give a row each",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="picture i has seed + i")
    add("--bs", type=int, default=16, help="pictures at a time")
    add = retrieval.add_argument_group("running").add_argument
    add("--sanity", type=int, default=64, metavar="N", help="real pictures sent through JPEG and the VAE; 0 = none")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--output", type=Path, default=Path("output/evaluation"), help="folder of JSON, table and contact sheets")

    fidelity = commands.add_parser("fidelity", help="FID and KID of two folders")
    add = fidelity.add_argument
    add("--generated", type=Path, required=True, help="folder of drawings")
    add("--reference", type=Path, required=True, help="folder of real pictures")
    add("--weights", type=Path, help="Inception weights of torch-fidelity; its cache when absent")
    add("--resize", type=int, default=256, help="px, by antialiased bicubic, before Inception")
    add("--bs", type=int, default=32, help="pictures at a time")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--output", type=Path, default=Path("output/evaluation/fidelity.json"), help="JSON file of the figures")

    clip = commands.add_parser("clip", help="CLIP score of pictures and their prompts")
    add = clip.add_argument
    add("--pictures", type=Path, required=True, help="folder of PNG files that carry their prompts")
    add("--model", default="openai/clip-vit-large-patch14", help="folder or hub id of a CLIP model")
    add("--bs", type=int, default=32, help="pictures at a time")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--output", type=Path, default=Path("output/evaluation/clip.json"), help="JSON file of the figures")
    return parser


def retrieval(args: argparse.Namespace) -> None:
    from diffusion.devices import choose_device
    from diffusion.evaluation.drawing import (
        DrawingSettings,
        evaluate_captions,
        evaluate_free_prompts,
        markdown_table,
        round_trips,
        spread,
        write_outcomes,
    )
    from diffusion.evaluation.free_prompts import read_free_prompts
    from diffusion.evaluation.retrieval import load_gallery
    from diffusion.inference.batch import load_pipeline
    from diffusion.inference.recipe import library_versions, model_fingerprint
    from diffusion.inference.solvers import algorithm_name

    solvers = [algorithm_name(name) for name in args.solver]
    prompts = read_free_prompts(args.free_prompts) if args.free_prompts else []
    device = choose_device(args.device)
    pipeline = load_pipeline(args.model, args.pipeline_load_from, algorithm=solvers[0], ema=args.ema, device=device)
    pipeline.set_progress_bar_config(disable=True)
    gallery = load_gallery(args.data)
    scales = args.guidance or [pipeline.usual_guidance]
    settings = [
        DrawingSettings(steps, scale, args.seed, args.bs, solver if len(solvers) > 1 else None)
        for solver, steps, scale in itertools.product(solvers, args.steps, scales)
    ]
    outcomes = evaluate_captions(pipeline, gallery, args.split, args.caption, settings, limit=args.limit)
    if prompts:
        outcomes += evaluate_free_prompts(pipeline, gallery, prompts, settings)
    if args.sanity:
        outcomes += round_trips(gallery, spread(range(len(gallery.samples)), args.sanity), pipeline.vae)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "model": str(args.model),
        "model_fingerprint": model_fingerprint(pipeline.transformer),
        "solver": " ".join(solvers),
        "seed": args.seed,
        "gallery": {"data": args.data, "pictures": len(gallery.samples), "groups": len(set(gallery.groups))},
        "versions": library_versions(),
    }
    write_outcomes(gallery, outcomes, args.output, facts)
    print(markdown_table([outcome.figures for outcome in outcomes]))
    print(f"written to {args.output}")


def fidelity(args: argparse.Namespace) -> None:
    from diffusion.devices import choose_device
    from diffusion.evaluation.fidelity import fidelity, picture_files

    generated, reference = picture_files(args.generated), picture_files(args.reference)
    device = choose_device(args.device)
    report = fidelity(
        generated, reference, weights=args.weights, device=device, batch_size=args.bs, resize_px=args.resize
    )
    write_json(args.output, report)
    print(f"FID {report['fid']:.3f}, KID {report['kid_mean']:.6f} +- {report['kid_std']:.6f}: {args.output}")
    if not report["weights_as_published"]:
        print(f"note: {report['weights']} is not the published Inception; do not call this figure FID")


def clip(args: argparse.Namespace) -> None:
    from diffusion.devices import choose_device
    from diffusion.evaluation.clip_score import clip_report
    from diffusion.evaluation.fidelity import picture_files

    pictures = picture_files(args.pictures)
    report = clip_report(pictures, args.model, device=choose_device(args.device), batch_size=args.bs)
    write_json(args.output, report)
    print(f"CLIP score {report['clip_score']:.3f}, {report['num_pictures']} pictures: {args.output}")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """With the command that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": shlex.join(["python", *sys.argv]), **report}, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    args = build_parser().parse_args()
    {"retrieval": retrieval, "fidelity": fidelity, "clip": clip}[args.command](args)


if __name__ == "__main__":
    run_cli(main)
