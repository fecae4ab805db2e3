"""What benchmarks of several processes share: starts of torchrun, and rows of training timed in them."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES = {256: 128, 512: 36, 1024: 9}  # samples a process that 80 GB take
COMPILED_BATCHES = {256: 144, 512: 40, 1024: 10}  # 0.4, 1.5 and 5.8 GiB each
TINY_BATCHES = {32: 4, 64: 4}
APART = "apart"  # all processes train at once, each as if it were the only one


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, warm_up: int) -> None:
    add = parser.add_argument
    add("--tiny", action="store_true", help="a small network at 32 and 64 px, to try this program")
    add("--device", default="auto", help="auto takes GPUs (default: %(default)s)")
    add("--steps", type=int, default=steps, help="timed steps a row (default: %(default)s)")
    add("--warm-up", type=int, default=warm_up, help="steps before them (default: %(default)s)")
    add("--compile", action="store_true", help="compile the blocks, in all rows of training")
    add("--part", help=argparse.SUPPRESS)  # what this process, started by `launch`, does
    add("--folder", type=Path, help=argparse.SUPPRESS)


def batches(args: argparse.Namespace) -> dict[int, int]:
    """Samples a process by size."""
    if args.tiny:
        return TINY_BATCHES
    return COMPILED_BATCHES if args.compile else BATCHES


def launch(part: str, processes: int, folder: str | Path) -> dict[str, Any]:
    """This program again under torchrun, for one part; returns what its main process left."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *sys.argv, "--part", part, "--folder", str(folder)]
    # A profiler that stays attached to the driver would slow the rows after the first that is profiled.
    usual = {"OMP_NUM_THREADS": "1", "TEARDOWN_CUPTI": "1"}
    subprocess.run(command, check=True, env={**usual, **os.environ})
    figures: dict[str, Any] = json.loads((Path(folder) / f"{part}.json").read_text())
    return figures


def in_this_start(args: argparse.Namespace, work: Callable[[Any], dict[str, Any]]) -> None:
    """A process of `launch`: what `work` makes of the ranks is left in PART.json by the main one."""
    import torch
    import torch.distributed as dist

    from diffusion.ranks import Ranks

    opener = Ranks(args.device)  # owns the process group; the runs share it
    ranks = Ranks(args.device)
    figures = work(ranks)
    if ranks.is_main:
        figures["device"] = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
        (args.folder / f"{args.part}.json").write_text(json.dumps(figures))
    if dist.is_initialized():
        dist.barrier()
    opener.close()


def write_stores(args: argparse.Namespace, folder: Path, batches: dict[int, int], processes: int) -> None:
    """A store for each size, with a global batch of `processes`."""
    from timed_training import TINY, write_features

    for size, batch in batches.items():
        channels = TINY["caption_channels"] if args.tiny else 4096
        write_features(folder / f"store-{size}", batch * processes, size, channels)


def time_row(
    args: argparse.Namespace,
    ranks: Any,
    size: int,
    batch: int,
    strategy: str,
    *,
    profiled: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Train for a while: speed of the slowest process, peak memory of the fullest card, and with `profiled` steps what
    communication takes."""
    from timed_training import TINY, make_config, run_timed

    config = make_config(
        args.folder / f"store-{size}",
        size,
        batch,
        args.warm_up + args.steps + profiled,
        **{
            "parallel": {"strategy": "ddp" if strategy == APART else strategy},
            "num_workers": 0 if args.tiny else 4,
            "compile": args.compile,
            **(TINY if args.tiny else {}),
            **options,
        },
    )
    work_dir = args.folder / f"{args.part}-{strategy}-{size}-{batch}"
    among = ranks
    if strategy == APART:
        among, work_dir = alone(ranks), work_dir.with_name(f"{work_dir.name}-{ranks.rank}")
        ranks.barrier()
    trainer = run_timed(config, work_dir, among, warm_up=args.warm_up, profiled=profiled)
    seconds, peaks = max(ranks.gather(trainer.seconds_a_step)), ranks.gather(trainer.peak_gib)
    row = {
        "images_per_s": round(batch * ranks.world_size / seconds, 2),
        "ms_a_step": round(1000 * seconds, 2),
        "spread": round(trainer.spread, 4),
        "peak_gib": None if peaks[0] is None else round(max(peaks), 2),
        "loss": trainer.last_loss,
        **(trainer.communication or {}),
    }
    if ranks.is_main:  # kept in the log, should a later row fail
        print(f"{ranks.world_size} x {strategy} {size} px: {row}", flush=True)
    del trainer
    free_memory(ranks.device)
    return row


def alone(ranks: Any) -> Any:
    """This process on its device, without the others."""
    own = copy.copy(ranks)
    own.rank, own.world_size, own.owns_group = 0, 1, False
    return own


def free_memory(device: Any) -> None:
    """Before the next row."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
