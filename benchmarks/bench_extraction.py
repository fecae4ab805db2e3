"""Extraction on one card against the original's way: captions by T5-XXL, pictures by the VAE, with random weights.

    python benchmarks/bench_extraction.py --out benchmarks/results/extraction_h100.json
    python benchmarks/bench_extraction.py --tiny --device cpu --out /tmp/extraction.json

Ours is what tools/extract_features.py --compile-vae does: files decoded by threads, captions end to end, rows written
to a store that is synced to the disk. The original's way is one caption a call, padded to 120 tokens, into a compressed
npz, and one picture a call in float32 into a npy; also with its 20 threads around one lock, which overlap the
compression. Rates are rows on the disk a second, after a first part that is not timed. FLOPs count real tokens, not
padding. "alone" leaves the disk out, which is measured by itself first. On an H100 about 6 minutes are expected.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from original_extraction import original_captions, original_pictures
from random_parts import FULL, TINY, make_text_encoder, make_vae
from report import write_report
from timing import compute_dtype, timed

from diffusion.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]
MAX_TOKENS, MEAN_TOKENS = 120, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=8192, help="by our extraction (default: %(default)s)")
    parser.add_argument("--original-captions", type=int, default=96, help="by the original's (default: %(default)s)")
    parser.add_argument(
        "--pictures", nargs="+", default=["256:4096:192:64", "512:2048:96:32", "1024:512:32:8"],
        help="PX:OURS:ORIGINAL:BATCH, numbers of pictures by either way and in a VAE call (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--token-budget", type=int, default=16384, help="tokens a T5 call (default: %(default)s)")
    parser.add_argument("--rows-per-shard", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="without --compile-vae")
    parser.add_argument("--tiny", action="store_true", help="tiny encoders, to try the program on a CPU")
    parser.add_argument("--folder", type=Path, help="where files are read and written (default: a temporary folder)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    args = parser.parse_args()
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for figures in measure(args, Path(name)):
            write_report(args.out, figures)  # after every part: a call that is cut off leaves those it has


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures, and the same again with each further part."""
    import torch

    from diffusion.devices import choose_device, matmul_rate

    device = choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = matmul_rate(device, 512 if args.tiny else 8192, compute_dtype(device))
    say(f"{name}: {peak / 1e12:.1f} TFLOP/s")
    figures: dict[str, Any] = {
        "benchmark": "extraction of captions and pictures against the original's way, random weights",
        "device": name,
        "matmul_tflops": round(peak / 1e12, 2),
        "disk_mb_per_s": round(disk_rate(folder, 8 if args.tiny else 512)),
    }
    figures["captions"] = captions(args, folder, device, peak)
    yield figures
    if device.type == "cuda":
        torch.cuda.empty_cache()
    figures["pictures"] = {}
    for entry in args.pictures:
        px, ours, original, batch_size = map(int, entry.split(":"))
        figures["pictures"][str(px)] = pictures(px, ours, original, batch_size, args, folder, device, peak)
        yield figures


def disk_rate(folder: Path, megabytes: int) -> float:
    """MB/s of writing two files one after the other, each synced as a shard is."""
    from diffusion.files import write_atomically

    content = random.Random(0).randbytes(1_000_000) * megabytes
    started = time.perf_counter()
    for name in ("first", "second"):
        write_atomically(folder / name, content)
    seconds = time.perf_counter() - started
    for name in ("first", "second"):
        (folder / name).unlink()
    return 2 * megabytes / seconds


def say(line: str) -> None:
    print(line, flush=True)


# Captions


def captions(args: argparse.Namespace, folder: Path, device: Any, peak: float) -> dict[str, Any]:

    from diffusion.features import ExtractionSettings
    from diffusion.features.sources import PictureFile, Sample

    encoder = build_text_encoder(args.tiny, device)
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    say(f"T5 of {parameters / 1e9:.2f} B parameters")
    texts, lengths = make_captions(encoder, args.captions + args.rows_per_shard)
    settings = ExtractionSettings(token_budget=args.token_budget, max_length=MAX_TOKENS)
    nowhere = PictureFile(folder / "none")
    samples = [Sample(f"{number}", nowhere, (text,)) for number, text in enumerate(texts)]
    warm, rest = samples[: args.rows_per_shard], samples[args.rows_per_shard :]
    store = Store(folder / "captions", args.rows_per_shard, encoder.hidden_size)
    store.write(warm, settings, encoder, None)
    seconds = timed(device, lambda: store.write(rest, settings, encoder, None))
    alone = timed(
        device, lambda: encoder.encode_unpadded([s.captions[0] for s in rest], token_budget=args.token_budget)
    )
    flops = sum(t5_flops(encoder.model.config, length) for length in lengths[args.rows_per_shard :])
    few = texts[: args.original_captions]
    one_by_one, threaded = original_captions(encoder, few, folder / "npz", device, MAX_TOKENS)
    rate = len(rest) / seconds
    result = {
        "parameters": parameters,
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "max_tokens": max(lengths),
        "ours_per_s": round(rate, 2),
        "ours_encoding_alone_per_s": round(len(rest) / alone, 2),
        "original_one_by_one_per_s": round(one_by_one, 2),
        "original_20_threads_per_s": round(threaded, 2),
        "ratio": round(rate / one_by_one, 1),
        "ratio_to_20_threads": round(rate / threaded, 1),
        "share_of_matmul_rate": round(flops / seconds / peak, 6),
        "share_of_matmul_rate_encoding_alone": round(flops / alone / peak, 6),
        "written_mb_per_s": round(sum(lengths[args.rows_per_shard :]) * encoder.hidden_size * 2 / 1e6 / seconds, 1),
    }
    say(f"captions: {result}")
    return result


def build_text_encoder(tiny: bool, device: Any) -> Any:
    """T5-XXL's encoder with random weights, made on the device, and the bundled tokenizer."""
    import torch

    from diffusion.text import CaptionEncoder

    torch.manual_seed(0)
    return CaptionEncoder(
        *make_text_encoder(TINY if tiny else FULL, device, compute_dtype(device)), max_length=MAX_TOKENS
    )


def make_captions(encoder: Any, count: int) -> tuple[list[str], list[int]]:
    """Captions of bundled words with 1 to 120 tokens, 60 on average, and their numbers of tokens."""
    import json

    lines = (ROOT / "data/emoji/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    words = sorted({word for line in lines for word in json.loads(line)["text"].split()})
    sizes = [len(ids) - 1 for ids in encoder.tokenizer(words)["input_ids"]]
    rng, texts = random.Random(0), []
    for _ in range(count):
        # Symmetric about the mean, and seldom at the ends.
        wanted, chosen = round(2 * MEAN_TOKENS * rng.betavariate(2, 2)) - 1, []
        while wanted > 0:
            number = rng.randrange(len(words))
            chosen.append(words[number])
            wanted -= sizes[number]
        texts.append(" ".join(chosen) or words[0])
    lengths = [min(len(ids), MAX_TOKENS) for ids in encoder.tokenizer(texts)["input_ids"]]
    return texts, lengths


def t5_flops(config: Any, length: int) -> float:
    """Of one caption of `length` tokens: projections, feed-forward, and the two products of attention."""
    inner = config.num_heads * config.d_kv
    weights = 4 * config.d_model * inner + 3 * config.d_model * config.d_ff
    return config.num_layers * (2.0 * weights * length + 4.0 * inner * length * length)


class Store:
    """Our extraction into a store; of rows that lack captions or latents, stand-ins of one number are written."""

    def __init__(self, root: Path, rows_per_shard: int, channels: int) -> None:
        import torch

        from diffusion.features import FeatureStoreWriter

        self.writer, self.rows_per_shard = FeatureStoreWriter(root, {}, torch.zeros(1, channels)), rows_per_shard
        self.channels = channels

    def write(self, samples: Sequence[Any], settings: Any, encoder: Any, vae: Any) -> None:
        from diffusion.features.extract import write_behind
        from diffusion.features.stages import Block, encode_blocks

        parts = [samples[start : start + self.rows_per_shard] for start in range(0, len(samples), self.rows_per_shard)]
        blocks = [Block(number, part) for number, part in zip(self.writer.free_numbers(), parts)]
        rows = sum(
            len(block.rows) for block in write_behind(encode_blocks(blocks, settings, encoder, vae), self.commit)
        )
        assert rows == len(samples)

    def commit(self, block: Any) -> None:
        import torch

        for row in block.rows:
            if not row.caption_embeds:
                row.caption_embeds = [torch.zeros(1, 1)]
            if row.latents_mean.ndim != 3:
                row.latents_mean = row.latents_std = torch.zeros(1, 1, 1)
        self.writer.commit_block(block)


# Pictures


def pictures(
    px: int, ours: int, original: int, batch_size: int, args: argparse.Namespace, folder: Path, device: Any, peak: float
) -> dict[str, Any]:
    """One size: `ours` and `original` are the numbers of pictures that each way encodes."""
    jpegs = make_jpegs(folder / f"jpeg{px}", ours + 2 * batch_size, px)
    result = {
        "batch_size": batch_size,
        **our_pictures(px, batch_size, jpegs, args, folder, device, peak),
        "original_per_s": round(original_rate(jpegs[:original], folder / f"npy{px}", px, args.tiny, device), 2),
    }
    result["ratio"] = round(result["ours_per_s"] / result["original_per_s"], 1)
    say(f"{px} px: {result}")
    return result


def our_pictures(
    px: int, batch_size: int, paths: Sequence[Path], args: argparse.Namespace, folder: Path, device: Any, peak: float
) -> dict[str, Any]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from diffusion.features import ExtractionSettings
    from diffusion.features.sources import PictureFile, Sample
    from diffusion.images import compile_encoder

    samples = [Sample(path.name, PictureFile(path), ("c",)) for path in paths]
    warm, rest = samples[: 2 * batch_size], samples[2 * batch_size :]
    settings = ExtractionSettings(image_size=px, batch_size=batch_size)
    torch.compiler.reset()  # else the second size would get kernels for any size
    vae = make_vae(TINY if args.tiny else FULL, 512, device, compute_dtype(device))
    zeros = torch.zeros(batch_size, 3, px, px, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.zeros(1, 3, px, px, device=device, dtype=vae.dtype))
    flops = counter.get_total_flops()
    eager = vae_alone(vae, zeros, device)
    if not args.eager:
        vae = compile_encoder(vae)
    store = Store(folder / f"store{px}", args.rows_per_shard, 1)
    store.write(warm, settings, None, vae)
    rate = len(rest) / timed(device, lambda: store.write(rest, settings, None, vae))
    alone = vae_alone(vae, zeros, device)
    return {
        "ours_per_s": round(rate, 2),
        "ours_encoding_alone_per_s": round(alone, 2),
        "eager_encoding_alone_per_s": round(eager, 2),
        "ours_decoding_alone_per_s": round(decoding_alone(rest[: max(1, len(rest) // 2)], settings), 2),
        "gflop_a_picture": round(flops / 1e9, 3),
        "share_of_matmul_rate": round(flops * rate / peak, 6),
        "share_of_matmul_rate_encoding_alone": round(flops * alone / peak, 6),
    }


def original_rate(paths: Sequence[Path], folder: Path, px: int, tiny: bool, device: Any) -> float:
    import torch

    vae = make_vae(TINY if tiny else FULL, 512, device, torch.float32)
    return original_pictures(vae, paths, folder, px, device)


def make_jpegs(folder: Path, count: int, px: int) -> list[Path]:
    """JPEG files of 4:3 whose shorter side is 1.25 px: 32 different ones, under as many names as asked for."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    height, width, rng = px * 5 // 4, px * 5 // 3, np.random.default_rng(px)
    paths = []
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if number < 32:
            coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
            grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        else:
            path.hardlink_to(paths[number % 32])
        paths.append(path)
    return paths


def vae_alone(vae: Any, pixels: Any, device: Any) -> float:
    """Pictures a second when they are on the device already."""
    from diffusion.images import encode_moments

    encode_moments(vae, pixels)
    calls = 8 if device.type == "cuda" else 2
    return calls * len(pixels) / timed(device, lambda: [encode_moments(vae, pixels) for _ in range(calls)])


def decoding_alone(samples: Sequence[Any], settings: Any) -> float:
    """Pictures a second when nothing encodes them, by as many threads as the extraction takes."""
    import os

    from diffusion.features.stages import decode_sample

    with ThreadPoolExecutor(max(4, min(32, os.cpu_count() or 4))) as pool:
        started = time.perf_counter()
        drain(pool.map(lambda sample: decode_sample(sample, settings), samples))
        return len(samples) / (time.perf_counter() - started)


def drain(items: Iterable[object]) -> None:
    for _ in items:
        pass


if __name__ == "__main__":
    run_cli(main)
