"""Seconds from the start of a process to its first picture: ours against diffusers + torch.compile, a new process each.

    python benchmarks/cold_start.py --row cold-512
    python benchmarks/cold_start.py --row cpu-cold

Runs take turns, A B C A B C, on one pipeline folder: XL/2, T5-XXL and SD's VAE with random weights, made once in
--folder, or in row cpu-cold the bundled model. The first turn finds an empty cache of compiled kernels, later ones what
it left.
Reports medians of import, load and picture, and writes a JSON with device, versions and command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import ConfigError, PixArtError, did_you_mean, run_cli

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "output/pretrained_models/emoji-256"
STAGES = ("import_s", "load_s", "picture_s")


@dataclass(frozen=True)
class Row:
    """Size in px, and whether the bundled model draws on the CPU."""

    pixels: int
    bundled: bool = False


ROWS = {"cold-256": Row(256), "cold-512": Row(512), "cold-1024": Row(1024), "cpu-cold": Row(256, bundled=True)}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--row", default="cpu-cold", help=f"row of the table: {', '.join(ROWS)}")
    add("--arms", nargs="+", default=["ours", "ours-eager", "diffusers", "diffusers-compile"], help="in this order")
    add("--turns", type=int, default=3, help="processes an arm after the first")
    add("--steps", type=int, default=20, help="of DPM-Solver++ with guidance")
    add("--folder", type=Path, default=ROOT / "output/benchmarks", help="keeps the random model (12 GB)")
    add("--device", default="auto", help="auto takes the GPU; row cpu-cold the CPU")
    add("--tiny", action="store_true", help="networks of some thousand weights at 64 px, to try the program")
    add("--output", type=Path, help="default: benchmarks/results/compare_ROW.json")
    add("--child", help=argparse.SUPPRESS)  # the arm that this process runs, from the model in --folder
    add("--began", type=float, help=argparse.SUPPRESS)  # when the parent started it, by time.time()
    add("--pixels", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.child:
        first_picture(args)
        return
    if args.row not in ROWS:
        raise ConfigError(f"--row {args.row} does not exist; {did_you_mean(args.row, list(ROWS))}")
    if args.tiny and args.output is None:
        raise ConfigError("--tiny measures nothing of worth; give its figures a place with --output")
    row = ROWS[args.row]
    args.device = "cpu" if row.bundled else args.device
    pixels = 64 if args.tiny else row.pixels
    model = BUNDLED if row.bundled and not args.tiny else random_model(args, pixels)
    with tempfile.TemporaryDirectory() as caches:
        turns = [
            {arm: run(args, arm, model, pixels, Path(caches) / arm) for arm in args.arms} for _ in range(args.turns + 1)
        ]
    rows = [figures_of(arm, [turn[arm] for turn in turns]) for arm in args.arms]
    first = rows[0]
    figures = {
        "benchmark": f"first picture of a new process, {pixels} px, {args.steps} steps with guidance; "
        + ("tiny networks" if args.tiny else "bundled model" if row.bundled else "XL/2"),
        "row": args.row,
        "device": turns[0][args.arms[0]]["device"],
        "ratios": {
            f"{first['arm']} / {other['arm']}": round(other["seconds"] / first["seconds"], 4) for other in rows[1:]
        },
        "rows": rows,
    }
    write_report(args.output or ROOT / f"benchmarks/results/compare_{args.row}.json", figures)


def run(args: argparse.Namespace, arm: str, model: Path, pixels: int, cache: Path) -> dict[str, Any]:
    """One process, and what it reports."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--child", arm, "--folder", model, "--pixels", pixels]
    command += ["--device", args.device, "--steps", args.steps, "--began", time.time()]
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PixArtError(f"arm {arm} failed: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}: {figures}", flush=True)
    return figures


def figures_of(arm: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one arm: seconds of its first process, and medians of the later ones."""
    first, *later = turns
    later = later or [first]
    medians = {stage: round(statistics.median(turn[stage] for turn in later), 3) for stage in STAGES}
    totals = [sum(turn[stage] for stage in STAGES) for turn in later]
    return {
        "arm": arm,
        "seconds": round(statistics.median(totals), 3),
        "spread": round((max(totals) - min(totals)) / 2 / statistics.median(totals), 4),
        "with_empty_cache_s": round(sum(first[stage] for stage in STAGES), 3),
        **medians,
        "turns": [{stage: round(turn[stage], 3) for stage in STAGES} for turn in turns],
    }


def first_picture(args: argparse.Namespace) -> None:
    """The work of one process; prints when it had imported, loaded and drawn."""
    import torch

    from diffusion.devices import choose_device, choose_dtype

    if args.child.startswith("ours"):
        from diffusion.inference import PixArtPipeline as Pipeline
    else:
        from diffusers import PixArtAlphaPipeline as Pipeline
    imported = time.time()
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    pipeline = loaded(Pipeline, args.child, args.folder, device, dtype)
    ready = time.time()
    size = {"height": args.pixels, "width": args.pixels, "num_inference_steps": args.steps}
    plain = {} if args.child.startswith("ours") else {"use_resolution_binning": False}
    pipeline.set_progress_bar_config(disable=True)
    pipeline("grinning face with big eyes", **size, **plain).images[0].load()
    drawn = time.time()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stages = dict(zip(STAGES, (imported - args.began, ready - imported, drawn - ready)))
    print(json.dumps({**stages, "device": name}))


def loaded(cls: Any, arm: str, folder: Path, device: Any, dtype: Any) -> Any:
    """The pipeline of an arm on its device."""
    if arm.startswith("ours"):
        from sampling_arms import make_fast

        pipeline = cls.from_pretrained(folder, device=device, torch_dtype=dtype, vae_dtype=dtype)
        make_fast(pipeline, arm)
        return pipeline
    from sampling_arms import compile_diffusers

    pipeline = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
    if arm == "diffusers-compile":
        compile_diffusers(pipeline, "reduce-overhead" if device.type == "cuda" else "default")
    elif arm != "diffusers":
        raise ConfigError(f"--arms {arm} does not exist; diffusers or diffusers-compile")
    return pipeline


def random_model(args: argparse.Namespace, pixels: int) -> Path:
    """A pipeline folder with random weights, made unless it is there."""
    import torch
    from random_parts import FULL, TINY
    from sampling_arms import Parts

    from diffusion.devices import choose_device, choose_dtype
    from diffusion.inference import PixArtPipeline, make_scheduler

    folder: Path = args.folder / f"{'tiny' if args.tiny else 'xl2'}-{pixels}"
    if (folder / "model_index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    device = choose_device(args.device)
    parts = Parts.random(TINY if args.tiny else FULL, pixels, device, choose_dtype("auto", device))
    pipeline = PixArtPipeline(
        parts.tokenizer, parts.text_encoder, parts.vae, parts.transformer, make_scheduler("dpm-solver")
    )
    pipeline.save_pretrained(folder)
    del pipeline, parts
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return folder


if __name__ == "__main__":
    run_cli(main)
