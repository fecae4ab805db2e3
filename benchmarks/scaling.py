"""One to eight GPUs of one host: training, communication, saves, and one picture drawn by all of them.

    python benchmarks/scaling.py --sections training --output benchmarks/results/scaling.json
    python benchmarks/scaling.py --sections saving sampling --output benchmarks/results/scaling.json
    python benchmarks/scaling.py --tiny --device cpu --processes 1 2 --output /tmp/scaling.json

Sections that the output file holds from an earlier call are kept, so a section is measured in one call as a whole.

training  XL/2 at each size, DDP, and with all GPUs FSDP2: images/s, scaling against one GPU of the same call, the part
          of a step in which communication ran and in which nothing else did (profiler), peak memory. One GPU with a
          quarter of the batch too, which tells what a step costs beside its pictures; "apart", all GPUs at once without
          any communication, which tells what scaling the slowest of them allows. Bus bandwidth of an all-reduce.
saving    seconds that training waits for a save, until it is on the disk, until a start has made its first step.
sampling  latency of one picture at the largest size from caption embeddings to pixels: guidance halves apart, tokens
          shared out, both.

`python tools/scaling_model.py` reads the result and reckons 64 to 1,024 GPUs (docs/scaling.md).
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parallel_rows import (
    APART,
    add_arguments,
    batches,
    free_memory,
    in_this_start,
    launch,
    time_row,
    write_stores,
)
from report import write_report
from sampling_rows import MODES, sampling_rows
from timing import finish

from diffusion.errors import run_cli

SECTIONS = ("training", "saving", "sampling")
STRATEGIES = ("ddp", "full_shard", "hybrid_shard", APART)
LEAST_SCALING = {("ddp", 256): 0.95, ("ddp", 512): 0.95, ("hybrid_shard", 256): 0.92, ("hybrid_shard", 512): 0.92}
LEAST_SPEED_UP = 3.5  # of one picture on all GPUs
BUCKET_BYTES = 100 * 2**20  # of an all-reduce of DDP here


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=10, warm_up=5)
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure (default: all)")
    add("--processes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of GPUs (default: %(default)s)")
    add("--sizes", type=int, nargs="+", help="px; default 256 512 1024")
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="of training (default: all)")
    add("--pictures", type=int, default=5, help="timed pictures a row of sampling (default: %(default)s)")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="of sampling (default: all)")
    add("--output", "--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.part is not None:
        in_this_start(args, lambda ranks: sections_here(args, ranks))
        return
    figures: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        if {"training", "saving"} & set(args.sections):
            write_stores(args, Path(folder), batches_of(args), max(args.processes))
        starts: list[dict[str, Any]] = []
        for count in args.processes:  # what is measured is written at once: a later start may be broken off
            starts.append(launch(f"{count}-processes", count, folder))
            write_report(args.output, with_starts(args, figures, starts))


def with_starts(args: argparse.Namespace, figures: dict[str, Any], starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of earlier calls with those of this call's starts so far, with ratios and bars."""
    others = [row for row in figures.get("seconds", []) if row["section"] not in args.sections]
    names = [name for name in starts[0] if name != "device"]
    joined = figures | {name: [row for start in starts for row in start[name]] for name in names}
    joined["seconds"] = others + joined["seconds"]
    joined["commands"] = {**figures.get("commands", {}), **dict.fromkeys(args.sections, shlex.join(sys.argv))}
    joined["device"] = f"{max(args.processes)} x {starts[0]['device']}"
    how = "compiled" if args.compile else "eager"
    joined["benchmark"] = "tiny network" if args.tiny else f"XL/2, samples a process {batches(args)}, {how}"
    add_ratios(joined)
    return joined


def sections_here(args: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    """Everything that is asked for, with this number of processes."""
    parts = {"training": training_part, "saving": saving_part, "sampling": sampling_part}
    figures: dict[str, Any] = {"seconds": []}
    for section in args.sections:
        began = time.monotonic()
        figures |= parts[section](args, ranks)
        seconds = round(time.monotonic() - began, 1)
        figures["seconds"].append({"section": section, "processes": ranks.world_size, "seconds": seconds})
    return figures


def batches_of(args: argparse.Namespace) -> dict[int, int]:
    known = batches(args)
    return {size: known[size] for size in args.sizes or known}


def strategies_of(args: argparse.Namespace, processes: int) -> list[str]:
    """Of training: DDP for each number of processes, the others for the most; several groups of several need four."""
    if processes < max(args.processes) or processes == 1:
        return ["ddp"]
    return [name for name in STRATEGIES if name in args.strategies and (name != "hybrid_shard" or processes >= 4)]


def training_part(args: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    rows = []
    for size, batch in batches_of(args).items():
        for strategy in strategies_of(args, ranks.world_size):
            options: dict[str, Any] = {}
            if strategy == "hybrid_shard":
                options["parallel"] = {"strategy": strategy, "shard_size": ranks.world_size // 2}
            profiled = 3 if ranks.world_size > 1 and strategy != APART else 0
            for samples in (batch, max(1, batch // 4)) if ranks.world_size == 1 else (batch,):
                row = time_row(args, ranks, size, samples, strategy, profiled=profiled, **options)
                rows.append({"processes": ranks.world_size, "strategy": strategy, "px": size, "batch": samples, **row})
                if ranks.is_main:
                    print(json.dumps(rows[-1]), flush=True)
    return {"training": rows, "all_reduce": [all_reduce_row(ranks)] if ranks.world_size > 1 else []}


def all_reduce_row(ranks: Any) -> dict[str, Any]:
    """Bus bandwidth, as nccl-tests count it: bytes that each link carries / time."""
    import torch
    import torch.distributed as dist

    size = BUCKET_BYTES if ranks.device.type == "cuda" else 2**20
    buffer = torch.zeros(size // 4, device=ranks.device)

    def seconds(count: int) -> float:
        ranks.barrier()
        began = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(buffer)
        finish(ranks.device)
        return (time.perf_counter() - began) / count

    seconds(5)
    took, world = seconds(20), ranks.world_size
    bus = 2 * (world - 1) / world * size / took / 1e9
    return {"processes": world, "mib": size >> 20, "ms": round(1000 * took, 3), "bus_gb_s": round(bus, 2)}


def saving_part(args: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    """Two saves and a start from the last one; the first, after one step, waits for the memory that it copies to.

    With the fewest processes and the most, since a checkpoint of XL/2 takes its time.
    """
    from timed_training import TINY, make_config, run_timed

    size, rows = min(batches_of(args)), []
    if ranks.world_size not in (min(args.processes), max(args.processes)):
        return {"saving": []}
    for strategy in ("ddp",) if ranks.world_size == 1 else ("ddp", "full_shard"):
        options: dict[str, Any] = dict(TINY) if args.tiny else {}
        options |= {
            "parallel": {"strategy": strategy},
            "num_workers": 0,
            "save_model_steps": 1,
            "checkpoints_total_limit": 2,
        }
        work_dir = args.folder / f"{args.part}-{strategy}"

        def run(steps: int, saves: str) -> Any:
            config = make_config(args.folder / f"store-{size}", size, 4, steps, **options)  # noqa: B023
            return run_timed(config, work_dir, ranks, warm_up=0, saves=saves)  # noqa: B023

        trainer = run(2, "timed")
        figures = {
            "first_wait_s": round(trainer.waits_s[0], 3),
            "wait_s": round(trainer.waits_s[1], 3),
            "on_disk_after_s": round(trainer.writes_s[1], 2),
        }
        folder = work_dir / "checkpoints/checkpoint-2"
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*")) if ranks.is_main else 0
        del trainer
        free_memory(ranks.device)
        began = time.perf_counter()
        trainer = run(3, "no")
        figures |= {
            "restore_s": round(trainer.restore_s, 2),
            "first_step_after_s": round(trainer.stepped_at - began, 2),
        }
        del trainer
        free_memory(ranks.device)
        rows.append({"processes": ranks.world_size, "strategy": strategy, "gb": round(num_bytes / 1e9, 3), **figures})
        if ranks.is_main:
            print(json.dumps(rows[-1]), flush=True)
        ranks.barrier()
        if ranks.is_main:
            shutil.rmtree(work_dir)
    return {"saving": rows}


def sampling_part(args: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    return {"sampling": sampling_rows(args, ranks)}


def add_ratios(figures: dict[str, Any]) -> None:
    """Scaling, speed-ups and bars, as far as their sections are there."""
    bars = {}
    alone = {row["px"]: row["images_per_s"] for row in reversed(figures.get("training", [])) if row["processes"] == 1}
    most = max((row["processes"] for row in figures.get("training", [])), default=1)
    for row in figures.get("training", []):
        if row["processes"] == 1 or row["px"] not in alone:
            continue
        row["scaling"] = round(row["images_per_s"] / row["processes"] / alone[row["px"]], 4)
        least = LEAST_SCALING.get((row["strategy"], row["px"]))
        if row["processes"] == most and least is not None:
            bars[f"{most} x {row['strategy']} {row['px']} px scales by {least} or more"] = row["scaling"] >= least
    sampling = figures.get("sampling", [])
    of_one = {row["mode"]: row["picture_ms"] for row in sampling if row["processes"] == 1}
    for row in sampling:
        if row["mode"] in of_one:
            row["speed_up"] = round(of_one[row["mode"]] / row["picture_ms"], 2)
    if of_one:
        best = {
            count: min(r["picture_ms"] for r in sampling if r["processes"] == count)
            for count in {row["processes"] for row in sampling}
        }
        many = max(best)
        ratio = round(best[1] / best[many], 2)
        figures["fastest_picture_speed_up"] = ratio
        bars[f"one picture on {many} GPUs is {LEAST_SPEED_UP} times faster or more"] = ratio >= LEAST_SPEED_UP
    figures["bars"] = bars


if __name__ == "__main__":
    run_cli(main)
