"""`train.py CONFIG --doctor`: everything that can be known to be wrong before a run, in seconds, as a table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoints import open_checkpoint, require_fit
from diffusion.config import TrainConfig
from diffusion.data import SampleKey
from diffusion.devices import cpu_multiplies_bfloat16
from diffusion.errors import EXIT_DONE, EXIT_USER_ERROR, PixArtError, StorageError
from diffusion.models import build_model
from diffusion.ranks import Ranks
from diffusion.training.building import build_training_data, model_options
from diffusion.training.reduce_check import REDUCE_TIMEOUT_S, check_reduce

_HASHED_BYTES = 256 << 20  # of a store's shards; all of a small one


@dataclass(frozen=True)
class Finding:
    """One line of the table; status is ok, warn or fail."""

    status: str
    subject: str
    text: str


def check_up(config: TrainConfig, work_dir: str | Path) -> int:
    """Print the table; returns the exit code: 0, or 2 if something failed, on whichever process."""
    ranks = Ranks(timeout_s=REDUCE_TIMEOUT_S)
    findings = examine(config, work_dir, ranks)
    if ranks.is_main:
        print_table(findings)
    failed = ranks.any(any(finding.status == "fail" for finding in findings))
    ranks.close()
    return EXIT_USER_ERROR if failed else EXIT_DONE


def examine(config: TrainConfig, work_dir: str | Path, ranks: Ranks) -> list[Finding]:
    """Look at devices, communication, disk, features and config; a check that raises has failed."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("devices", lambda: _devices(config, ranks)),
        ("communication", lambda: _communication(ranks)),
        ("disk", lambda: _disk(config, Path(work_dir))),
        ("features", lambda: _features(config)),
        ("config", lambda: _config(config, ranks)),
    ]
    findings = []
    for subject, check in checks:
        try:
            findings += list(check())
        except (PixArtError, OSError, RuntimeError, ValueError) as error:
            findings.append(Finding("fail", subject, " ".join(str(error).split())))
    return findings


def print_table(findings: list[Finding]) -> None:
    """One line a finding, and a summary."""
    for finding in findings:
        print(f"{finding.status:5} {finding.subject:14} {finding.text}")
    failed, warned = (sum(finding.status == status for finding in findings) for status in ("fail", "warn"))
    print(f"{len(findings)} checks: {failed} failed, {warned} warnings")


def _devices(config: TrainConfig, ranks: Ranks) -> Iterator[Finding]:
    if ranks.device.type != "cuda":
        yield Finding("warn", "devices", f"no GPU: training runs on {os.cpu_count()} CPU cores")
        yield from _precision_of_cpu(config.mixed_precision)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        used = (total - free) / 2**30
        status = "warn" if used > 0.1 * total / 2**30 else "ok"
        text = f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        yield Finding(status, "devices", text + (" (another program uses it)" if status == "warn" else ""))
    if config.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
        yield Finding("fail", "devices", "the GPU has no bf16; set mixed_precision='fp16'")
    square = torch.randn(1024, 1024, device=ranks.device)
    exact = square.cpu().double() @ square.cpu().double()
    error = ((square @ square).cpu().double() - exact).norm() / exact.norm()
    status = "ok" if error < 1e-2 else "fail"
    yield Finding(status, "devices", f"{ranks.device} multiplies matrices with relative error {error:.1e}")


def _precision_of_cpu(mixed_precision: str) -> Iterator[Finding]:
    """A line where another precision would be faster."""
    if cpu_multiplies_bfloat16():
        if mixed_precision == "no":
            text = "the CPU has products of bfloat16: mixed_precision='bf16' with kernels.attention='auto' is faster"
            yield Finding("ok", "devices", text)
    elif mixed_precision != "no":
        yield Finding("warn", "devices", "the CPU has no products of bfloat16; mixed_precision='no' is faster")


def _communication(ranks: Ranks) -> Iterator[Finding]:
    if ranks.world_size > 1:
        is_right, text = check_reduce(ranks)
        yield Finding("ok" if is_right else "fail", "communication", text)
    elif torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        try:
            done = subprocess.run(
                [*command, "-m", "diffusion.training.reduce_check"],
                capture_output=True,
                text=True,
                timeout=REDUCE_TIMEOUT_S,
            )
            lines = done.stdout.strip().splitlines()
            text = lines[-1] if done.returncode == 0 and lines else done.stderr.strip()[-300:]
            yield Finding("ok" if done.returncode == 0 else "fail", "communication", " ".join(text.split()))
        except subprocess.TimeoutExpired:
            text = f"NCCL over {count} GPUs did not finish in {REDUCE_TIMEOUT_S} s; try NCCL_P2P_DISABLE=1"
            yield Finding("fail", "communication", text)
    else:
        yield Finding("ok", "communication", "one process needs none; start this under torchrun to test several")


def save_bytes(config: TrainConfig) -> int:
    """Size of one checkpoint: weights, EMA and two moments in float32, post-hoc averages."""
    with torch.device("meta"):
        network = build_model(config.model, **model_options(config))
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    averages = (config.ema_rate is not None) + len(config.posthoc_ema.sigma_rels if config.posthoc_ema else ())
    moments = 1 if config.optimizer.type in ("Lion", "SGD") else 2
    return weights * (1 + averages + moments)


def _disk(config: TrainConfig, work_dir: Path) -> Iterator[Finding]:
    place = work_dir.absolute()
    while not place.exists():
        place = place.parent
    probe = place / f".doctor-{os.getpid()}"
    try:
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{place} cannot be written ({error.strerror}); choose another --work-dir") from error
    size, free = save_bytes(config), shutil.disk_usage(place).free
    kept = (config.checkpoints_total_limit or 2) + 1  # the new one is written before an old one goes
    text = f"{place}: {free / 2**30:.1f} GiB free, a save has {size / 2**30:.2f} GiB"
    if size > 0.9 * free:
        yield Finding("fail", "disk", f"{text}; make room or choose another --work-dir")
    elif kept * size > 0.9 * free:
        yield Finding("warn", "disk", f"{text}; {kept} of them do not fit")
    else:
        yield Finding("ok", "disk", text)


def _features(config: TrainConfig) -> Iterator[Finding]:
    dataset = build_training_data(config)  # opens the store, compares fingerprints with the pipeline and the config
    yield Finding("ok", "features", f"{config.data.type} with {len(dataset)} samples fits the config")
    for store in getattr(dataset, "feature_stores", []):
        if store.files.url is None:
            yield _hash_sample(store)
    began = time.perf_counter()
    samples = [dataset[SampleKey(index * len(dataset) // 32, 0)] for index in range(32)]
    speed = len(samples) / (time.perf_counter() - began)
    if not all(s.latents_mean.isfinite().all() and s.caption_embeds.isfinite().all() for s in samples):
        yield Finding("fail", "features", "a sample holds NaN or infinity; extract the features again")
    yield Finding("ok", "features", f"32 samples read at {speed:.0f}/s by one process")


def _hash_sample(store: Any) -> Finding:
    hashed = 0
    for shard in store.manifest["shards"]:
        if hashed and hashed + shard["bytes"] > _HASHED_BYTES:
            break
        store.files.checked(shard, verify=True)
        hashed += shard["bytes"]
    return Finding("ok", "features", f"{store.root}: hashes of {hashed / 2**20:.0f} MiB of its shards are right")


def _config(config: TrainConfig, ranks: Ranks) -> Iterator[Finding]:
    if config.load_from is not None:
        with torch.device("meta"):
            network = build_model(config.model, **model_options(config))
        require_fit(network, open_checkpoint(config.load_from).state_dict, config.load_from)
        yield Finding("ok", "config", f"load_from={config.load_from!r} fits {config.model}")
    batch = config.train_batch_size * ranks.world_size * config.gradient_accumulation_steps
    text = f"{config.model} at {config.image_size} px, global batch {batch} on {ranks.world_size} processes, "
    yield Finding("ok", "config", text + f"{config.strategy}, {config.mixed_precision}")
    if config.pipeline_load_from is None:
        yield Finding("warn", "config", "pipeline_load_from is not set: no pictures are drawn while training")
