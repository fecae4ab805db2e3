"""Training on the CPU as `make demo` does it: images/s, and the share of a step spent waiting for data.

    python tools/extract_features.py data/emoji --out output/features/emoji-demo --limit 160
    python benchmarks/bench_training_cpu.py

Runs configs/emoji/emoji_demo.py without validation in a temporary work-dir; medians over the steps after the first 5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write_report

from diffusion.errors import run_cli

CONFIG = "configs/emoji/emoji_demo.py"
WARM_UP_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training_cpu.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work_dir:
        options = [f"max_steps={args.steps}", "validation.prompts=[]", "validation.num_samples=0"]
        command = [sys.executable, "train_scripts/train.py", CONFIG, "--work-dir", work_dir, "--report_to", "none"]
        subprocess.run([*command, "--cfg-options", *options], check=True)
        rows = [json.loads(line) for line in (Path(work_dir) / "metrics.jsonl").read_text().splitlines()]
    measured = rows[WARM_UP_STEPS:]
    figures = {
        "benchmark": f"{CONFIG}, batch 16, float32",
        "images_per_s_median": round(statistics.median(row["images_per_s"] for row in measured), 2),
        "data_wait_share_median": round(statistics.median(row["data_wait_share"] for row in measured), 4),
        "data_wait_share_max": round(max(row["data_wait_share"] for row in measured), 4),
        "steps_measured": len(measured),
    }
    write_report(args.output, figures)


if __name__ == "__main__":
    run_cli(main)
