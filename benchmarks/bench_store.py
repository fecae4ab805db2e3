"""Time to read one random training sample: the Arrow store against the original's compressed .npz.

    python benchmarks/bench_store.py --rows 2048 --channels 4096 --tokens 120

Writes a store of synthetic features and caption files with the same numbers to a temporary folder, reads samples in
random order from a warm page cache, and writes medians in milliseconds as JSON. A store read includes the tensors of
the latents and of one caption; an .npz read includes decompression, the mask and the tensor, without any latents.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import write_report

from diffusion.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="rows of the store (default: %(default)s)")
    parser.add_argument("--files", type=int, default=50, help=".npz files to compare with (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=4096, help="width of T5 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=120, help="tokens of a padded caption (default: %(default)s)")
    parser.add_argument("--kept", type=int, default=40, help="tokens that are no padding (default: %(default)s)")
    parser.add_argument("--reads", type=int, default=2000, help="timed reads of the store (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/store.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    write_report(args.output, figures)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    import numpy as np
    import torch

    from diffusion.data import SampleKey, StoreDataset
    from diffusion.features import FeatureRow, FeatureStoreWriter, read_caption_npz

    torch.set_num_threads(1)
    writer = FeatureStoreWriter(folder / "store", {}, torch.zeros(1, args.channels), rows_per_shard=256)
    for number in range(args.rows):
        latents = torch.randn(4, 32, 32)
        caption = torch.randn(args.kept, args.channels)
        row = FeatureRow(
            str(number), (256, 256), (256, 256), (0, 0, 256, 256), latents, latents.abs(), ["c"], [caption]
        )
        writer.add(row)
    writer.close()
    for number in range(args.files):
        feature = torch.randn(1, args.tokens, args.channels).numpy()
        mask = (np.arange(args.tokens) < args.kept).astype(np.int64)[None]
        np.savez_compressed(folder / f"{number}.npz", caption_feature=feature, attention_mask=mask)

    dataset = StoreDataset(folder / "store")
    order = random.Random(0)
    store = timed(args.reads, lambda: dataset[SampleKey(order.randrange(args.rows), order.randrange(1 << 40))])
    original = timed(
        4 * args.files, lambda: read_caption_npz(folder / f"{order.randrange(args.files)}.npz", args.tokens)
    )
    return {
        "benchmark": f"one random training sample: 32 x 32 latents, a caption of {args.kept} x {args.channels}",
        "store_ms": store,
        "original_npz_ms": original,
        "ratio_of_medians": round(original["median"] / store["median"], 1),
    }


def timed(count: int, read: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of `count` calls after a warm-up of a tenth as many."""
    for _ in range(max(1, count // 10)):
        read()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        read()
        times.append(1000 * (time.perf_counter() - started))
    return {"median": round(statistics.median(times), 4), "p99": round(sorted(times)[int(0.99 * count)], 4)}


if __name__ == "__main__":
    run_cli(main)
