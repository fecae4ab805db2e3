"""What the presets need and do: peak memory, seconds a step, loss after some steps, under a memory cap.

    python benchmarks/measure_presets.py                     # on a CUDA card, a few minutes
    python benchmarks/measure_presets.py --tiny              # on a CPU, to see that it runs

Each preset trains in a process of its own that may take no more of the card than the preset promises; what it needs
beyond that is an error. The pictures are the bundled ones at the preset's size; for the XL/2 presets their captions are
made as wide and long as T5-XXL's (4096 numbers, 120 tokens), and training starts from initial weights instead of the
official ones, which changes neither memory nor time. Writes benchmarks/results/presets.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

PARTS = "output/pretrained_models/emoji-256"
# preset -> config, GiB that it may take (the card's size less what CUDA itself takes), optimiser steps
PRESETS: dict[str, tuple[str, float, int]] = {
    "scratch-tiny": ("configs/presets/scratch_tiny.py", 7.5, 300),
    "full-24gb": ("configs/presets/full_24gb.py", 22.5, 100),
    "full-80gb": ("configs/presets/full_80gb.py", 76.0, 100),
}
TINY = ["hidden_size=64", "depth=2", "num_heads=2", "train_batch_size=2", "num_workers=0", "mixed_precision=no"]
PICTURES = 128  # of the stores of XL/2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="NAME", help=", ".join(PRESETS))
    add("--steps", type=int, help="optimiser steps of every preset (default: 300 for scratch-tiny, else 100)")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every preset")
    add("--tiny", action="store_true", help="very small networks and two steps, without a memory cap")
    add("--child", choices=PRESETS, help=argparse.SUPPRESS)
    add("--work-dir", type=Path, default=Path("output/measure-presets"))
    add("--output", type=Path, default=Path("benchmarks/results/presets.json"))
    args = parser.parse_args()
    if args.child is not None:
        measure(args, args.child)
        return
    rows = {name: in_a_process(args, name) for name in args.presets}
    write_report(args.output, {"benchmark": "presets under a memory cap", "tiny": args.tiny, "presets": rows})


def in_a_process(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Figures of a preset, or its error."""
    command = [sys.executable, __file__, "--child", name, "--work-dir", str(args.work_dir)]
    command += ["--steps", str(args.steps)] if args.steps else []
    command += ["--tiny"] if args.tiny else []
    command += ["--cfg-options", *args.cfg_options] if args.cfg_options else []
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    result = args.work_dir / name / "figures.json"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def measure(args: argparse.Namespace, name: str) -> None:
    """Train a preset and write figures.json beside its run."""
    import torch

    from diffusion.config import load_config
    from diffusion.training import Reporting, Trainer, denoising_objective

    path, cap_gib, steps = PRESETS[name]
    steps = 2 if args.tiny else args.steps or steps
    work_dir = args.work_dir / name
    shutil.rmtree(work_dir, ignore_errors=True)
    options = [f"max_steps={steps}", f"save_model_steps={steps + 1}", "log_interval=1", "validation.prompts=[]"]
    options += ["load_from=None", "validation.num_samples=0", *(TINY if args.tiny else [])]
    store = store_for(args, name)
    config = load_config(path, [*options, f"data.root={str(store)!r}", *args.cfg_options])
    on_card = torch.cuda.is_available()
    if on_card and not args.tiny:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    trainer = Trainer(config, denoising_objective, work_dir, reporting=Reporting(tensorboard=False))
    trainer.fit()
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    batch = trainer.global_batch
    later = rows[min(5, len(rows) - 1) :]
    figures = {
        "config": path,
        "device": torch.cuda.get_device_name() if on_card else "cpu",
        "cap_gib": cap_gib if on_card and not args.tiny else None,
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_card else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_card else None,
        "seconds_a_step": round(statistics.median(batch / row["images_per_s"] for row in later), 4),
        "images_per_s": round(statistics.median(row["images_per_s"] for row in later), 2),
        "global_batch": batch,
        "steps": steps,
        "first_loss": round(losses[0], 4),
        "last_loss": round(statistics.mean(losses[-5:]), 4),
        "weights_at_start": "initial",
    }
    (work_dir / "figures.json").write_text(json.dumps(figures))


def store_for(args: argparse.Namespace, name: str) -> Path:
    """Features of the bundled pictures at the preset's size; wide captions for XL/2."""
    from diffusion.features import ExtractionSettings, extract_folder

    wide = name != "scratch-tiny"
    size = 512 if wide else 256
    size = size // 8 if args.tiny else size
    limit = 16 if args.tiny else PICTURES if wide else None
    narrow = args.work_dir / f"features-{size}-{limit}"
    if not (narrow / "manifest.json").is_file():
        settings = ExtractionSettings(image_size=size, dtype="bf16", batch_size=8)
        extract_folder("data/emoji", narrow, PARTS, settings, limit=limit)
    if args.tiny:
        args.cfg_options += [f"image_size={size}"]
    return widened(narrow, narrow.with_name(f"{narrow.name}-wide")) if wide else narrow


def widened(source: Path, target: Path) -> Path:
    """The same store with captions as T5-XXL would leave long ones: a fixed random map to 4096, repeated to 120."""
    from dataclasses import replace

    import torch

    from diffusion.features import FeatureStore, FeatureStoreWriter

    if (target / "manifest.json").is_file():
        return target
    store = FeatureStore(source)
    channels = store.caption_channels
    lift = torch.randn(channels, 4096, generator=torch.Generator().manual_seed(0)) / channels**0.5

    def wide(caption: Any) -> Any:
        repeats = -(-120 // len(caption))
        return (caption.float() @ lift).repeat(repeats, 1)[:120].to(store.dtype)

    fingerprint = {key: store.fingerprint[key] for key in ("image_size", "multi_scale", "max_length")}
    writer = FeatureStoreWriter(target, fingerprint, (store.null_caption.float() @ lift), dtype="bf16")
    for index in range(len(store)):
        row = store.row(index)
        writer.add(replace(row, caption_embeds=[wide(caption) for caption in row.caption_embeds]))
    writer.close()
    return target


if __name__ == "__main__":
    run_cli(main)
