"""LCM and LCM-LoRA of the bundled model: how much of the teacher's 20 steps is left at 8, 4, 2 and 1?

    python benchmarks/finetune_lcm.py

Extracts data/emoji where that is missing, trains both from the bundled weights, draws labels of both splits with the
same seeds, and counts how often the drawing is nearest to the picture that was meant (R@1). The bundled model as it is
draws in as few steps too, by the LCM's solver: what it lacks is what distillation gave. Writes figures, a sheet, and
the LoRA in 16 bit, as peft has it. Minutes on one GPU; to try it on a CPU:
--pictures 24 --steps 2 --lora-steps 2 --batch-size 2 --limit 2 --bs 4.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from finetuning import PARTS, add_arguments, drawn, ensure_store, labels_of, open_pipeline, rows_of, train, write_sheet
from report import write_report

from diffusion.adapters import merge, read_adapter_from, remove_adapters, write_layout
from diffusion.config.sampling_cli import BUNDLED_LCM_LORA
from diffusion.errors import run_cli
from diffusion.evaluation.drawing import DrawingSettings
from diffusion.evaluation.retrieval import load_gallery
from diffusion.inference.program import show_notices
from diffusion.training.distillation import LCM, LCMLoRA

STEPS = (8, 4, 2, 1)
SHOWN = 6  # prompts on the sheet
BARS = {"LCM": 5.0, "LCM-LoRA": 8.0}  # points of R@1 that 4 steps may lose against the teacher's 20


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "finetune_lcm")
    add = parser.add_argument
    add("--steps", type=int, default=300, help="optimiser steps of LCM (default: %(default)s)")
    add("--lora-steps", type=int, default=150, help="optimiser steps of LCM-LoRA (default: %(default)s)")
    add("--features", type=Path, default=Path("output/features/emoji-256"), help="feature store (default: %(default)s)")
    add("--lora", type=Path, default=Path(BUNDLED_LCM_LORA), help="folder of the LoRA")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    show_notices()
    store = ensure_store(args.data, args.features, args.pictures)
    gallery = load_gallery(args.data)
    rows = rows_of(gallery, args.limit)
    pictures: dict[str, list] = {}
    result: dict[str, dict] = {}
    pictures["teacher 20"], result["teacher"] = drawn(
        open_pipeline(), gallery, rows, DrawingSettings(20, batch_size=args.bs)
    )

    def draw_few(name: str, transformer: Any) -> None:
        pipeline = open_pipeline(transformer, "lcm")
        result[name] = {}
        for count in STEPS:
            settings = DrawingSettings(count, 1.0, batch_size=args.bs)
            pictures[f"{name} {count}"], result[name][f"{count} steps"] = drawn(pipeline, gallery, rows, settings)

    draw_few("undistilled", PARTS)
    seconds = {}
    for name, family, config, steps in (
        ("LCM", LCM(), "configs/emoji/emoji_lcm.py", args.steps),
        ("LCM-LoRA", LCMLoRA(), "configs/emoji/emoji_lcm_lora.py", args.lora_steps),
    ):
        begun = time.perf_counter()
        work_dir = args.work_dir / name.lower()
        trainer = train(config, family, work_dir, store, steps, args)
        seconds[name] = round(time.perf_counter() - begun, 1)
        network = work_dir / "checkpoints" / f"checkpoint-{steps}"
        if isinstance(family, LCMLoRA):
            network = trainer.state.network
            adapter = replace(read_adapter_from(network), base_model=PARTS)
            write_layout(adapter, args.lora, "peft", dtype=torch.float16)
            merge(network, ["default"])
            remove_adapters(network)
        draw_few(name, network)
    lost = {name: round(result["teacher"]["r1"] - result[name]["4 steps"]["r1"], 1) for name in BARS}
    bars = {f"{name}: 4 steps lose at most {bar:g} points": lost[name] <= bar for name, bar in BARS.items()}
    write_report(args.output, {
        "benchmark": "R@1 in percent of labels of both splits, same seeds", "drawings": len(rows),
        "steps": {"LCM": args.steps, "LCM-LoRA": args.lora_steps}, "batch_size": args.batch_size,
        "training_seconds": seconds, **result, "lost_at_4_steps": lost, "bars": bars,
        "lora": str(args.lora),
    })  # fmt: skip
    write_sheet(args.grid, pictures, labels_of(gallery, rows), SHOWN)


if __name__ == "__main__":
    run_cli(main)
