"""One GPU against two: DDP and FSDP2 at 256 and 512 px with XL/2, peak memory, and resuming across all of them.

    python benchmarks/bench_parallel.py --output benchmarks/results/parallel.json
    python benchmarks/bench_parallel.py --tiny --device cpu --output /tmp/parallel.json

Scaling = images/s of two processes / (2 x images/s of one), at the same batch a process, in one run of this program;
one process is timed before and after the two. The resume rows train a network of four blocks: two steps under DDP, two
under full_shard, two in one process, against six in one process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from parallel_rows import add_arguments, batches, in_this_start, launch, time_row, write_stores
from report import write_report

from diffusion.errors import run_cli

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp_by_nccl": {"strategy": "ddp", "sums_by": "nccl"},
    "full_shard": {"strategy": "full_shard"},
    "shard_grad_op": {"strategy": "shard_grad_op"},
}
AT_EVERY_SIZE = ("ddp", "full_shard")  # the others at the smallest
LEAST_SCALING = {"ddp": 0.97, "full_shard": 0.93, "shard_grad_op": 0.93}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=30, warm_up=8)
    parser.add_argument("--processes", type=int, default=2, help="GPUs (default: %(default)s)")
    parser.add_argument("--output", "--out", type=Path, default=Path("benchmarks/results/parallel.json"))
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.part is not None:
        in_this_start(args, lambda ranks: run_part(args, ranks))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_stores(args, Path(folder), sizes_of(args), args.processes)
        parts = {
            part: launch(part, processes, folder)
            for part, processes in (("before", 1), ("many", args.processes), ("after", 1))
        }
    write_report(args.output, summary(args, parts))


def sizes_of(args: argparse.Namespace) -> dict[int, int]:
    return {size: batch for size, batch in batches(args).items() if size != 1024}


def run_part(args: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    """Rows of one number of processes."""
    figures: dict[str, Any] = {}
    for size, batch in sizes_of(args).items():
        names = STRATEGIES if size == min(sizes_of(args)) else AT_EVERY_SIZE
        for name in names if args.part == "many" else ["ddp"]:
            row = time_row(args, ranks, size, batch, name, profiled=3, parallel=STRATEGIES[name])
            figures[f"{ranks.world_size} x {name} {size} px"] = row
    if args.part == "many":
        resume_part(args, ranks, "moved", 2, "ddp")
        resume_part(args, ranks, "moved", 4, "full_shard")
    if args.part == "after":
        moved = resume_part(args, ranks, "moved", 6, "ddp")
        reference = resume_part(args, ranks, "reference", 6, "ddp")
        figures["resume"] = {"moved": moved, "one process": reference}
    return figures


def resume_part(args: argparse.Namespace, ranks: Any, name: str, until: int, strategy: str) -> dict[str, float]:
    """Train to a step, from the last checkpoint of the folder if there is one; returns the losses of all steps."""
    from timed_training import TINY, make_config, run_timed

    size = min(sizes_of(args))
    options: dict[str, Any] = {"depth": 4, **TINY} if args.tiny else {"depth": 4}
    config = make_config(
        args.folder / f"store-{size}",
        size,
        8 // ranks.world_size,
        until,
        parallel={"strategy": strategy},
        num_workers=0,
        num_epochs=100,
        mixed_precision="no",
        log_interval=1,
        lr_schedule_args={"num_warmup_steps": 0},
        **options,
    )
    run_timed(config, args.folder / name, ranks, warm_up=0, saves="last")
    if not ranks.is_main:
        return {}
    rows = [json.loads(line) for line in (args.folder / name / "metrics.jsonl").read_text().splitlines()]
    return {str(row["step"]): row["loss"] for row in rows if "loss" in row}


def summary(args: argparse.Namespace, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Rows, scaling, memory and bars."""
    device, resume = parts["many"].pop("device"), parts["after"].pop("resume")
    alone = {
        name.removeprefix("1 x ddp "): [parts[part][name]["images_per_s"] for part in ("before", "after")]
        for name in parts["before"]
        if name != "device"
    }
    scaling = {}
    for name, row in parts["many"].items():
        rates = alone[name.split(" ", 3)[-1]]
        scaling[name] = round(row["images_per_s"] / args.processes / (sum(rates) / len(rates)), 4)
    gaps = [abs(resume["moved"][step] / loss - 1) for step, loss in resume["one process"].items()]
    bars = {"a run that moved from ddp to full_shard to one process has the losses of one process": max(gaps) < 1e-3}
    for name, value in scaling.items():
        if least := LEAST_SCALING.get(name.split()[2]):
            bars[f"{name} scales by {least} or more"] = value >= least
    return {
        "benchmark": "tiny network"
        if args.tiny
        else f"XL/2, samples a process {sizes_of(args)}, {'compiled' if args.compile else 'eager'}",
        "device": f"{args.processes} x {device}",
        "rows": {**{name: row for name, row in parts["before"].items() if name != "device"}, **parts["many"]},
        "one_process_before_and_after": alone,
        "scaling": scaling,
        "resume": {**resume, "largest relative gap": max(gaps)},
        "bars": bars,
    }


if __name__ == "__main__":
    run_cli(main)
