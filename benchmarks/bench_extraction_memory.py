"""Is the memory of an extraction flat? tools/extract_features.py over many small pictures, watched from outside.

    python benchmarks/bench_extraction_memory.py

The pictures are hard links to 64 JPEG files of 32 px with captions of the bundled data. Encoders are tiny random ones,
so that it takes minutes on one core; what they hold does not grow with the number of pictures. Resident memory is read
from /proc twice a second and reported at each tenth of the committed pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="of the encoders: cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/extraction_memory.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = make_pictures(Path(folder) / "pictures", args.pictures)
        encoders = make_encoders(Path(folder) / "encoders")
        write_report(args.out, watch(source, encoders, Path(folder) / "store", args.pictures, args.device))


def make_pictures(folder: Path, count: int) -> Path:
    """An ImageFolder of `count` pictures."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rows = (ROOT / "data/emoji/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(row)["text"] for row in rows]
    noise, rng = np.random.default_rng(0), random.Random(0)
    lines = []
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        if number < 64:
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        else:
            path.hardlink_to(folder / f"{number % 64:06d}.jpg")
        lines.append(json.dumps({"file_name": path.name, "text": rng.choice(captions)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_encoders(folder: Path) -> Path:
    """A pipeline folder of a tiny T5, the bundled tokenizer and a tiny VAE."""
    import torch
    from bench_extraction import build_text_encoder
    from random_parts import TINY, make_vae

    cpu = torch.device("cpu")
    encoder = build_text_encoder(True, cpu)
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    encoder.model.save_pretrained(folder / "text_encoder")
    make_vae(TINY, 512, cpu, torch.float32).save_pretrained(folder / "vae")
    return folder


def watch(source: Path, encoders: Path, store: Path, count: int, device: str) -> dict[str, Any]:
    """Run the extraction; resident MiB by the share of pictures that are committed."""
    command = [sys.executable, str(ROOT / "tools/extract_features.py"), str(source), "--out", str(store)]
    command += ["--pretrained", str(encoders), "--image-size", "32", "--batch-size", "64", "--device", device]
    started, seen = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            entries = (store / ".blocks").glob("[0-9]*.json")  # not what is being written aside
            done = sum(json.loads(entry.read_text())["shard"]["rows"] for entry in entries)
            if (resident := resident_mib(process.pid)) is not None:
                seen.append((done / count, resident))
            time.sleep(0.5)
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    tenths = {}
    for tenth in range(1, 10):
        at = [resident for share, resident in seen if tenth <= 10 * share < tenth + 1]
        tenths[f"{10 * tenth} %"] = max(at, default=None)
    return {
        "benchmark": "resident memory of an extraction over many small pictures",
        "pictures": count,
        "pictures_per_s": round(count / seconds, 1),
        "resident_mib_at": tenths,
        "resident_mib_peak": max(resident for _, resident in seen),
    }


def resident_mib(pid: int) -> int | None:
    """VmRSS of a process; None when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return kib[0] // 1024 if kib else None


if __name__ == "__main__":
    run_cli(main)
