"""One-step distillation (DMD) of the bundled model: how much of the teacher's 20 steps is left in one?

    python benchmarks/finetune_dmd.py

Extracts data/emoji where that is missing, lets the teacher draw its captions as pairs for the regression loss, trains
the generator, draws labels of both splits with the same seeds, and counts how often the drawing is nearest to the
picture that was meant (R@1). The bundled model as it is draws in one step too: what it lacks is what distillation gave.
Minutes on one GPU; to try it on a CPU: --pictures 24 --steps 2 --batch-size 2 --limit 2 --bs 4 --pair-steps 2.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from finetuning import PARTS, add_arguments, drawn, ensure_store, labels_of, open_pipeline, rows_of, train, write_sheet
from report import write_report

from diffusion.config import load_config
from diffusion.errors import run_cli
from diffusion.evaluation.drawing import DrawingSettings
from diffusion.evaluation.retrieval import load_gallery
from diffusion.inference.program import show_notices
from diffusion.inference.solvers import make_one_step_scheduler
from diffusion.training.one_step import DMD, write_pairs

CONFIG = "configs/emoji/emoji_dmd.py"
SHOWN = 12


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "finetune_dmd")
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="optimiser steps (default: %(default)s)")
    add("--regression-weight", type=float, default=0.25, help="of the pairs; 0 makes none (default: %(default)s)")
    add("--pair-steps", type=int, default=20, help="DDIM steps of a pair (default: %(default)s)")
    add("--features", type=Path, default=Path("output/features/emoji-256"), help="feature store (default: %(default)s)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    show_notices()
    store = ensure_store(args.data, args.features, args.pictures)
    gallery = load_gallery(args.data)
    rows = rows_of(gallery, args.limit)
    begun = time.perf_counter()
    if args.regression_weight:
        store = pairs_of(store, args)
    pairs_made = time.perf_counter()
    args.cfg_options = [f"regression_weight={args.regression_weight}", *args.cfg_options]
    train(CONFIG, DMD(), args.work_dir / "run", store, args.steps, args)
    seconds = {"pairs": round(pairs_made - begun, 1), "training": round(time.perf_counter() - pairs_made, 1)}

    pictures: dict[str, list[Any]] = {}
    result: dict[str, Any] = {}
    settings = DrawingSettings(20, batch_size=args.bs)
    pictures["teacher, 20 steps"], result["teacher"] = drawn(open_pipeline(), gallery, rows, settings)
    one = load_config(CONFIG).one_step_timestep
    checkpoint = args.work_dir / "run" / "checkpoints" / f"checkpoint-{args.steps}"
    for name, transformer in (("undistilled", PARTS), ("DMD", checkpoint)):
        pipeline = open_pipeline(transformer)
        pipeline.scheduler = make_one_step_scheduler(one, pipeline.transformer.config.prediction_type)
        settings = DrawingSettings(1, 1.0, batch_size=args.bs)
        pictures[f"{name}, 1 step"], result[name] = drawn(pipeline, gallery, rows, settings)
    write_report(args.output, {
        "benchmark": "R@1 in percent of labels of both splits, same seeds", "drawings": len(rows),
        "steps": args.steps, "batch_size": args.batch_size, "regression_weight": args.regression_weight,
        "seconds": seconds, **result, "lost": round(result["teacher"]["r1"] - result["DMD"]["r1"], 1),
    })  # fmt: skip
    write_sheet(args.grid, pictures, labels_of(gallery, rows), SHOWN, side=96)


def pairs_of(store: Path, args: argparse.Namespace) -> Path:
    """The teacher's drawings of the store's captions, anew."""
    out = args.work_dir / "pairs"
    shutil.rmtree(out, ignore_errors=True)
    write_pairs(
        store, out, open_pipeline(algorithm="ddim"), num_inference_steps=args.pair_steps, guidance_scale=3.0,
        limit=args.pictures, batch_size=args.bs,
    )  # fmt: skip
    return out


if __name__ == "__main__":
    run_cli(main)
