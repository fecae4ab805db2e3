"""Samples a second that the loader gives a run of XL/2 at 256 px: a store of T5-XXL captions, several workers.

    python benchmarks/bench_loader.py --workers 8 --output benchmarks/results/loader.json

Writes a store of synthetic features to a temporary folder (16 KB of latents and 60 tokens of 4096 numbers on average a
row, as T5-XXL leaves them), and draws batches in the sampler's order from a warm page cache, to the card where there is
one. Nothing trains, so this is what the loader can do at most. On a card also: how long another thread of the process
stands still for a batch, since a thread that launches kernels would.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

TRAINING_RATE = 900  # samples a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="rows of the store (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=4096, help="width of T5 (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="loading processes (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=400, help="timed batches (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="where batches go (default: %(default)s)")
    parser.add_argument("--output", "--out", type=Path, default=Path("benchmarks/results/loader.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    write_report(args.output, figures)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from diffusion.data import AspectRatioBatchSampler, StoreDataset, build_loader
    from diffusion.data.sampler import EndlessBatches
    from diffusion.devices import choose_device

    device = choose_device(args.device)
    write_store(folder / "store", args.rows, args.channels)
    dataset = StoreDataset(folder / "store")
    sampler = AspectRatioBatchSampler(dataset.buckets, batch_size=args.batch_size)
    on_card = device.type == "cuda"
    batches = iter(build_loader(dataset, EndlessBatches(sampler), args.workers, pin_memory=on_card))
    # Workers start, and every row comes into the page cache, before the clock does.
    for _ in range(len(sampler) + 4 * args.workers):
        next(batches)
    tokens, started = 0, time.perf_counter()
    for _ in range(args.batches):
        batch = next(batches).to(device)
        tokens += batch.caption_embeds.shape[0] * batch.caption_embeds.shape[1]
    if on_card:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    samples = args.batches * args.batch_size
    pauses: dict[str, list[float]] = {"memory given back": [], "memory freed": []} if on_card else {}
    for _ in range(3):
        for way, found in pauses.items():
            found.append(longest_pauses(batches, args.batch_size, device, give_back=way == "memory given back"))
    return {
        "benchmark": f"loader of XL/2 at 256 px: 32 x 32 latents, captions of 60 x {args.channels} on average",
        "device": torch.cuda.get_device_name(device) if on_card else "cpu",
        "workers": args.workers,
        "batch_size": args.batch_size,
        "samples_per_s": round(samples / seconds, 1),
        "samples_per_s_a_worker": round(samples / seconds / max(1, args.workers), 1),
        "gb_per_s": round(tokens * args.channels * 2 / seconds / 1e9, 2),
        "longest pause of another thread a batch, ms": {way: statistics.median(found) for way, found in pauses.items()},
        "load_average": round(os.getloadavg()[0], 1),
    }


def longest_pauses(batches: Any, batch_size: int, device: Any, *, give_back: bool, count: int = 20) -> float:
    """Milliseconds in which a thread of Python stood still, the longest of each batch, median; batches come at the pace
    of training. Without `give_back` workers' batches are freed as they are."""
    import diffusion.data.batch as module

    usual, ends, longest = module.discard, threading.Event(), []
    worst = 0.0

    def pulse() -> None:
        nonlocal worst
        last = time.perf_counter()
        while not ends.is_set():
            now = time.perf_counter()
            worst, last = max(worst, now - last), now

    module.discard = usual if give_back else lambda tensor: None
    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        for number in range(count + 5):  # the first were ready before
            worst = 0.0
            next(batches).to(device)
            time.sleep(batch_size / TRAINING_RATE)
            if number >= 5:
                longest.append(1000 * worst)
    finally:
        module.discard = usual
        ends.set()
        thread.join()
    return round(statistics.median(longest), 2)


def write_store(root: Path, rows: int, channels: int) -> None:
    """A store of random features; captions have 1 to 120 tokens, 60 on average."""
    import torch

    from diffusion.features import FeatureRow, FeatureStoreWriter

    writer, rng = FeatureStoreWriter(root, {}, torch.zeros(1, channels)), random.Random(0)
    noise, size = torch.randn(120, channels).bfloat16(), (256, 256)
    for number in range(rows):
        latents, length = torch.randn(4, 32, 32), max(1, round(120 * rng.betavariate(2, 2)))
        row = FeatureRow(f"{number}", size, size, (0, 0, 256, 256), latents, latents.abs(), ["c"], [noise[:length]])
        writer.add(row)
    writer.close()


if __name__ == "__main__":
    run_cli(main)
