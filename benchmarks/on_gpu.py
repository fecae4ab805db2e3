"""Everything that only a GPU can show, by name: its tests and the measurements behind benchmarks/results.

    python benchmarks/on_gpu.py --list
    python benchmarks/on_gpu.py tests memory extraction --minutes 30 --logs output/on_gpu

What is named runs one after another, each with a log of its own; a failure does not stop the rest. With --minutes, what
is not expected to fit into the time that is left is not begun, and named at the end. Results go where each program
writes them, into benchmarks/results unless it says otherwise.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from compare import ROWS

from diffusion.errors import PixArtError, run_cli

ROOT = Path(__file__).resolve().parents[1]


AND = " && python "


class Task(NamedTuple):
    """Arguments of python, of several programs with AND between them; expected seconds on H100s; how many it needs."""

    command: str
    seconds: int
    gpus: int = 1


_BENCH, _CAPTIONS = "benchmarks", "output/features/emoji-captions"
_GPU_TESTS = "tests/models tests/process tests/inference tests/training tests/text tests/test_devices.py"
TASKS = {
    "tests": Task(f"-m pytest -q -n 8 --dist loadfile -m 'not slow' {_GPU_TESTS}", 150),
    "tests-slow": Task("-m pytest -q -m slow tests/models tests/inference/test_fast.py", 200),
    "memory": Task(f"{_BENCH}/bench_memory_plans.py", 560),
    "extraction": Task(f"{_BENCH}/bench_extraction.py --out {_BENCH}/results/extraction_h100.json", 450),
    "loader": Task(f"{_BENCH}/bench_loader.py --workers 8", 120),
    "overhead": Task(f"{_BENCH}/bench_training_overhead.py --batch-size 64", 180),
    "presets": Task(f"{_BENCH}/measure_presets.py", 280),
    "stages": Task(f"{_BENCH}/recipe_stages.py", 400),
    "emoji-captions": Task(
        f"tools/add_captions.py data/emoji --output build/emoji-captions --captions 16{AND}"
        f"tools/extract_features.py build/emoji-captions --out {_CAPTIONS}",
        100,
    ),
    "emoji-alignment": Task(  # after emoji-captions
        f"train_scripts/train_alignment_encoder.py --data data/emoji --output output/alignment-encoder{AND}"
        f"tools/extract_alignment.py {_CAPTIONS} --encoder output/alignment-encoder "
        "--out output/features/emoji-alignment",
        100,
    ),
    "levers": Task(  # after both
        f"{_BENCH}/ablation_emoji.py --steps 540 --equal_flops --output {_BENCH}/results/ablation_levers.json "
        "--arms base 'TREAD, ended' 'REPA, ended' 'REPA and TREAD' flow",
        450,
    ),
    "saving": Task(f"{_BENCH}/bench_saving.py", 180),
    "finetuning": Task(f"{_BENCH}/bench_finetuning.py", 220),
    "finetuning-kept": Task(
        f"{_BENCH}/bench_finetuning.py --no_checkpointing --output {_BENCH}/results/finetuning_kept.json", 130
    ),
    "finetuning-fast": Task(
        f"{_BENCH}/bench_finetuning.py --no_checkpointing --compile --cuda_graph "
        f"--output {_BENCH}/results/finetuning_fast.json",
        250,
    ),
    "finetuning-small": Task(
        f"{_BENCH}/bench_finetuning.py --rows full lora --no_checkpointing --compile --cuda_graph --kernels --profile "
        f"--batch_size 1 --output {_BENCH}/results/finetuning_small.json",
        70,
    ),
    "lcm": Task(f"{_BENCH}/finetune_lcm.py", 300),
    "controlnet": Task(f"{_BENCH}/finetune_controlnet.py", 580),
    "lora": Task(f"{_BENCH}/finetune_lora.py", 200),
    "diffusers": Task(f"{_BENCH}/finetune_diffusers.py", 120),
    "dmd": Task(f"{_BENCH}/finetune_dmd.py", 400),
    "dreambooth": Task(f"{_BENCH}/finetune_dreambooth.py", 300),
    "fast-sampling": Task(f"{_BENCH}/check_fast_sampling.py", 300),
    "lossy-sampling": Task(f"{_BENCH}/bench_lossy_sampling.py --device cuda --dtype bfloat16 --limit 48", 200),
    "levers-256": Task(f"{_BENCH}/bench_training_levers.py --pixels 256 --out {_BENCH}/results/levers_256.json", 540),
    "levers-512": Task(f"{_BENCH}/bench_training_levers.py --pixels 512 --out {_BENCH}/results/levers_512.json", 540),
    "recipe-texts": Task(f"{_BENCH}/bundled_recipe.py texts encoder", 330),
    "recipe-transformer": Task(
        f"{_BENCH}/bundled_recipe.py features transformer folder evaluate --from-bundled vae", 560
    ),
    "kernels": Task(f"{_BENCH}/bench_kernels.py --sweep", 120),
    "small-training": Task(f"{_BENCH}/bench_small_training.py", 200),
    "fp8-band": Task(f"{_BENCH}/fp8_loss_band.py", 560),
    "cold-512": Task(f"{_BENCH}/cold_start.py --row cold-512", 500),
    **{f"row:{row}": Task(f"{_BENCH}/compare.py {row}", 300) for row in ROWS if not row.startswith("cpu-")},
    "parallel": Task(f"{_BENCH}/bench_parallel.py --compile", 330, 2),
    "scaling-sampling": Task(f"{_BENCH}/scaling.py --sections sampling --processes 1 4 2", 300, 4),
    "scaling-training": Task(f"{_BENCH}/scaling.py --sections training --processes 1 4 2 --compile", 560, 4),
    "scaling-saving": Task(f"{_BENCH}/scaling.py --sections saving --processes 1 4", 250, 4),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="names, expected seconds, GPUs and commands")
    parser.add_argument("--minutes", type=float, help="begin nothing that is not expected to end within them")
    parser.add_argument("--logs", type=Path, default=Path("output/on_gpu"), help="folder (default: %(default)s)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.list or not args.tasks:
        for name, task in TASKS.items():
            print(f"{name:18} {task.seconds:4} s  {task.gpus} GPU  python {task.command}")
        return
    if unknown := [name for name in args.tasks if name not in TASKS]:
        raise PixArtError(f"unknown: {', '.join(unknown)}; the names are {', '.join(TASKS)}")
    began, failed = time.monotonic(), []
    args.logs.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        left = float("inf") if args.minutes is None else 60 * args.minutes - (time.monotonic() - began)
        if TASKS[name].seconds > left:
            print(f"{name}: not begun, {left:.0f} s are left and {TASKS[name].seconds} s expected", flush=True)
            failed.append(name)
            continue
        if run(name, args.logs / f"{name.replace(':', '_')}.log"):
            failed.append(name)
    if failed:
        raise PixArtError(f"failed or not begun: {', '.join(failed)}; logs are in {args.logs}")


def run(name: str, log: Path) -> int:
    """One task; its exit status."""
    began = time.monotonic()
    with log.open("w") as stream:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4", **os.environ}
        for command in TASKS[name].command.split(AND):
            program = [sys.executable, *shlex.split(command)]
            status = subprocess.run(
                program, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
            ).returncode
            if status:
                break
    print(f"{name}: exit {status} after {time.monotonic() - began:.0f} s, {log}", flush=True)
    if status:
        print("".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return status


if __name__ == "__main__":
    run_cli(main)
