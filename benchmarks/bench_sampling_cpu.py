"""Seconds for one 256 px picture on the CPU: DPM-Solver++, 20 steps with guidance, weights loaded.

    python benchmarks/bench_sampling_cpu.py

Writes a JSON with the times, command, device and versions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from report import write_report

from diffusion.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="output/pretrained_models/emoji-256")
    parser.add_argument("--prompt", default="grinning face with big eyes")
    parser.add_argument("--size", type=int, default=256, help="px (default 256)")
    parser.add_argument("--steps", type=int, default=20, help="solver steps (default 20)")
    parser.add_argument("--repeats", type=int, default=5, help="timed pictures after one warm-up (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice when absent")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sampling_cpu.json"))
    return parser


def main() -> None:
    args = build_parser().parse_args()

    import torch

    from diffusion.inference import PixArtPipeline

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipeline = PixArtPipeline.from_pretrained(args.model_path, algorithm="dpm-solver")
    pipeline.set_progress_bar_config(disable=True)
    times = []
    for repeat in range(args.repeats + 1):
        started = time.perf_counter()
        pipeline(args.prompt, num_inference_steps=args.steps, height=args.size, width=args.size, seed=repeat)
        times.append(time.perf_counter() - started)
    result = {
        "benchmark": "one picture, DPM-Solver++ with guidance 4.5, batch 1, float32",
        "size_px": args.size,
        "steps": args.steps,
        "median_s": round(statistics.median(times[1:]), 3),
        "times_s": [round(value, 3) for value in times[1:]],
        "warm_up_s": round(times[0], 3),
        "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
    }
    write_report(args.output, result)


if __name__ == "__main__":
    run_cli(main)
