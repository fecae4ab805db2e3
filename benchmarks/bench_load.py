"""Seconds and peak memory of building PixArt XL/2 on the CPU and loading its 2.4 GB of float32 weights.

    python benchmarks/bench_load.py

Writes a random model once to a temporary folder (5 GB: a diffusers folder and a native .pth), then loads each in fresh
processes with the files in the page cache, as sampling does ("folder") and as training starts ("training_folder",
"training_pth"). Peak memory is what VmHWM gains over the load, over the bytes of the weights: 1.0 is one copy.
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

MODEL = "PixArtMS_XL_2"
SIZE = {"input_size": 128, "pe_interpolation": 2.0}
KINDS = ("folder", "training_folder", "training_pth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/load_xl2_cpu.json"))
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.files)))
        return
    with tempfile.TemporaryDirectory() as name:
        files = Path(name)
        weight_bytes = write_files(files)
        result = {kind: summary(kind, files, args.repeats, weight_bytes) for kind in KINDS}
    figures = {
        "benchmark": f"{MODEL} at 1024 px, float32, built and loaded on the CPU",
        "weights_gb": round(weight_bytes / 1e9, 3),
        **result,
    }
    write_report(args.output, figures)


def write_files(files: Path) -> int:
    """A random model as `folder/transformer` and `model.pth`; returns the bytes of its weights."""
    import torch

    from diffusion.checkpoints import save_transformer
    from diffusion.models import build_model

    model = build_model(MODEL, **SIZE)
    save_transformer(model, files / "folder" / "transformer")
    torch.save({"state_dict": model.state_dict()}, files / "model.pth")
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(kind: str, files: Path) -> dict[str, float]:
    """Load once in this process."""
    import time

    import torch

    from diffusion.checkpoints import load_transformer
    from diffusion.config import load_config
    from diffusion.training.building import build_network

    torch.set_grad_enabled(False)
    config = load_config("configs/pixart_config/PixArt_xl2_img1024_internalms.py", notify=lambda line: None)
    before = _peak_bytes()
    started = time.perf_counter()
    if kind == "folder":
        model = load_transformer(files / "folder")
    else:
        model = build_network(config, files / ("folder" if kind == "training_folder" else "model.pth"))
    checksum = sum(float(parameter.sum()) for parameter in model.parameters())  # touches every page
    return {"seconds": time.perf_counter() - started, "peak_bytes": _peak_bytes() - before, "checksum": checksum}


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def summary(kind: str, files: Path, repeats: int, weight_bytes: int) -> dict[str, object]:
    """Medians over fresh processes."""
    command = [sys.executable, __file__, "--measure", kind, "--files", str(files)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(repeats)
    ]
    return {
        "median_s": round(statistics.median(run["seconds"] for run in runs), 2),
        "times_s": [round(run["seconds"], 2) for run in runs],
        "peak_copies": round(max(run["peak_bytes"] for run in runs) / weight_bytes, 2),
    }


if __name__ == "__main__":
    run_cli(main)
