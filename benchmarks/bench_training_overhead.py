"""What a step costs beside its forward pass, backward pass and optimiser: data, clipping, EMA, checks, logs.

    python benchmarks/bench_training_overhead.py --batch-size 64 --output benchmarks/results/training_overhead.json
    python benchmarks/bench_training_overhead.py --tiny --device cpu --output /tmp/overhead.json

The trainer runs XL/2 at 256 px on synthetic features. The bare loop runs the same network on the same batches, resident
on the device: forward, backward, fused AdamW and nothing else. Overhead = 1 - bare / trainer, of times a step; the bare
loop is timed before and after. Rows without clipping and without EMA say what these two take.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

BAR = 0.04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the benchmark itself")
    parser.add_argument("--device", default="auto", help="auto takes the GPU (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps a row (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--output", "--out", type=Path, default=Path("benchmarks/results/training_overhead.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_report(args.output, measure(args, Path(folder)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from timed_training import TINY, make_config, run_timed, write_features

    from diffusion.ranks import Ranks

    ranks = Ranks(args.device)
    write_features(folder / "store", 4 * args.batch_size, 256, TINY["caption_channels"] if args.tiny else 4096)
    sizes = TINY if args.tiny else {}
    rows = {"trainer": {}, "without clipping": {"gradient_clip": None}, "without EMA": {"ema_rate": None}}
    seconds, bare = {}, []
    for name, options in rows.items():
        config = make_config(
            folder / "store", 256, args.batch_size, args.warm_up + args.steps, compile=args.compile, **sizes, **options
        )
        trainer = run_timed(config, folder / name, ranks, warm_up=args.warm_up)
        seconds[name] = statistics.mean(trainer.seconds_of_steps)  # with those that log
        if name != "without clipping":
            bare.append(time_bare_loop(trainer, args.steps, args.warm_up))
        del trainer
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    overhead = 1 - sum(bare) / len(bare) / seconds["trainer"]
    on_card = ranks.device.type == "cuda"
    return {
        "benchmark": f"{'tiny network' if args.tiny else 'XL/2'} at 256 px, batch {args.batch_size}, "
        f"{'compiled' if args.compile else 'eager'}",
        "device": torch.cuda.get_device_name() if on_card else "cpu",
        "ms_a_step": {name: round(1000 * value, 3) for name, value in seconds.items()},
        "ms_a_step_bare_loop": [round(1000 * value, 3) for value in bare],
        "overhead": round(overhead, 4),
        "clipping": round(1 - seconds["without clipping"] / seconds["trainer"], 4),
        "ema": round(1 - seconds["without EMA"] / seconds["trainer"], 4),
        "bars": {f"overhead <= {BAR}": overhead <= BAR},
    }


def time_bare_loop(trainer: Any, steps: int, warm_up: int) -> float:
    """Seconds a step of forward, backward and optimiser on batches that lie on the device."""
    import torch

    from diffusion.data import SampleKey, collate

    sampler, device, config = trainer.sampler, trainer.ranks.device, trainer.config
    plan, size = sampler.plan(0), sampler.global_batch
    batches = [
        collate([trainer.dataset[SampleKey(index, step * size + i)] for i, index in enumerate(plan[step % len(plan)])])
        for step in range(4)
    ]
    batches = [batch.to(device) for batch in batches]
    optimizer = torch.optim.AdamW(trainer.state.network.parameters(), lr=1e-6, fused=True)

    def run(count: int) -> None:
        for step in range(count):
            optimizer.zero_grad(set_to_none=True)
            with trainer._autocast():
                trainer.objective.loss(trainer.model, batches[step % 4], config.seed).loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    run(warm_up)
    began = time.perf_counter()
    run(steps)
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    run_cli(main)
