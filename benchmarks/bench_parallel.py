"""One GPU against two: DDP and FSDP2 at 256 and 512 px with XL/2, peak memory, and resuming across all of them.

    python benchmarks/bench_parallel.py --output benchmarks/results/parallel.json
    python benchmarks/bench_parallel.py --tiny --device cpu --output /tmp/parallel.json

Scaling = images/s of two processes / (2 x images/s of one), at the same batch a process, in one run of this program.
The resume rows train a network of four blocks: two steps under DDP, two under full_shard, two in one process, against
six in one process. Three starts of torchrun; each start runs its rows one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

BATCHES = {256: 64, 512: 24}  # samples a process; activations take 0.35 and 1.4 GiB a sample
STRATEGIES = ("ddp", "full_shard", "shard_grad_op")
LEAST_SCALING = 0.9


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small network at 32 and 64 px, to try this program")
    parser.add_argument("--device", default="auto", help="auto takes GPUs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a row (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=8, help="steps before them (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="GPUs (default: %(default)s)")
    parser.add_argument("--output", "--out", type=Path, default=Path("benchmarks/results/parallel.json"))
    parser.add_argument("--part", choices=("one", "many", "last"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.part is not None:
        run_part(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        results: dict[str, Any] = {}
        for part, processes in (("one", 1), ("many", args.processes), ("last", 1)):
            launch(part, processes, folder)
            results |= json.loads((Path(folder) / f"{part}.json").read_text())
    write_report(args.output, summary(args, results))


def launch(part: str, processes: int, folder: str) -> None:
    """This program again, under torchrun, for one part."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *sys.argv, "--part", part, "--folder", folder]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def sizes_of(args: argparse.Namespace) -> dict[int, int]:
    return {32: 4, 64: 4} if args.tiny else BATCHES


def prepare(args: argparse.Namespace, folder: Path) -> None:
    from timed_training import TINY, write_features

    for size, batch in sizes_of(args).items():
        channels = TINY["caption_channels"] if args.tiny else 4096
        write_features(folder / f"store-{size}", 4 * batch * args.processes, size, channels)


def run_part(args: argparse.Namespace) -> None:
    """Rows of one number of processes; the main one leaves PART.json."""
    import torch
    import torch.distributed as dist

    from diffusion.ranks import Ranks

    opener = Ranks(args.device)  # owns the process group; the runs share it
    ranks = Ranks(args.device)
    results: dict[str, Any] = {}
    if args.part != "last":
        for size, batch in sizes_of(args).items():
            for strategy in STRATEGIES if args.part == "many" else STRATEGIES[:1]:
                results[f"{ranks.world_size} x {strategy} {size} px"] = time_row(args, ranks, size, batch, strategy)
                gc.collect()
                if ranks.device.type == "cuda":
                    torch.cuda.empty_cache()
    if args.part == "many":
        resume_part(args, ranks, "moved", 2, "ddp")
        resume_part(args, ranks, "moved", 4, "full_shard")
    if args.part == "last":
        moved = resume_part(args, ranks, "moved", 6, "ddp")
        reference = resume_part(args, ranks, "reference", 6, "ddp")
        results["resume"] = {"moved": moved, "one process": reference}
    if ranks.is_main:
        results["device"] = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
        (args.folder / f"{args.part}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
    opener.close()


def time_row(args: argparse.Namespace, ranks: Any, size: int, batch: int, strategy: str) -> dict[str, Any]:
    from timed_training import TINY, make_config, run_timed

    config = make_config(
        args.folder / f"store-{size}",
        size,
        batch,
        args.warm_up + args.steps,
        parallel={"strategy": strategy},
        num_workers=0 if args.tiny else 4,
        **(TINY if args.tiny else {}),
    )
    work_dir = args.folder / f"{ranks.world_size}-{strategy}-{size}"
    trainer = run_timed(config, work_dir, ranks, warm_up=args.warm_up)
    peaks = ranks.gather(trainer.peak_gib)
    return {
        "images_per_s": round(trainer.global_batch / trainer.seconds_a_step, 2),
        "ms_a_step": round(1000 * trainer.seconds_a_step, 2),
        "peak_gib": None if peaks[0] is None else round(max(peaks), 2),
        "loss": trainer.last_loss,
    }


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
    run_timed(config, args.folder / name, ranks, warm_up=0, saves=True)
    if not ranks.is_main:
        return {}
    rows = [json.loads(line) for line in (args.folder / name / "metrics.jsonl").read_text().splitlines()]
    return {str(row["step"]): row["loss"] for row in rows if "loss" in row}


def summary(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Rows, scaling, memory and bars."""
    device, resume = results.pop("device"), results.pop("resume")
    alone = {name.removeprefix("1 x ddp "): row for name, row in results.items() if name.startswith("1 x")}
    scaling = {
        name: round(row["images_per_s"] / args.processes / alone[name.split(" ", 3)[-1]]["images_per_s"], 3)
        for name, row in results.items()
        if not name.startswith("1 x")
    }
    gaps = [abs(resume["moved"][step] / loss - 1) for step, loss in resume["one process"].items()]
    bars = {"a run that moved from ddp to full_shard to one process has the losses of one process": max(gaps) < 1e-3}
    bars |= {
        f"{name} scales by {LEAST_SCALING} or more": value >= LEAST_SCALING
        for name, value in scaling.items()
        if " ddp " in name
    }
    return {
        "benchmark": "tiny network" if args.tiny else f"XL/2, samples a process {BATCHES}",
        "device": f"{args.processes} x {device}",
        "rows": results,
        "scaling": scaling,
        "resume": {**resume, "largest relative gap": max(gaps)},
        "bars": bars,
    }


if __name__ == "__main__":
    run_cli(main)
