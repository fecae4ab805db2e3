"""Runs of several processes in one start of them: python -m torch.distributed.run ... parallel_worker.py SCENARIO ...

Every scenario is a function of (config file, folder); what it leaves in the folder is what tests look at.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from diffusion.config import load_config
from diffusion.errors import PixArtError
from diffusion.ranks import Ranks
from diffusion.training import Reporting, Trainer, copied_sums, denoising_objective, parallel
from diffusion.training.copied_sums import CopiedSums, PeerMemory
from diffusion.training.families import family_named

SMALL = ["hidden_size=32", "depth=2", "num_heads=2"]
MODES = {
    "ddp": [],
    "copies": [],
    "full": ["use_fsdp=True"],
    "grad_op": ["parallel.strategy='shard_grad_op'"],
    "hybrid": ["parallel.strategy='hybrid_shard'", "parallel.shard_size=2"],
}


def train(config_file: Path, work_dir: Path, *options: str, fault: str = "", resume: bool = False) -> Trainer:
    os.environ["FAULT"] = fault
    trainer = Trainer(
        load_config(config_file, [*SMALL, *options], notify=lambda line: None),
        denoising_objective,
        work_dir,
        reporting=Reporting(tensorboard=False),
        resume_from="latest" if resume else None,
        ranks=Ranks(),
    )
    trainer.fit()
    return trainer


def local_batch(accumulation: int = 1) -> list[str]:
    """The global batch of the tiny config (4), spread over the processes."""
    return [
        f"train_batch_size={4 // dist.get_world_size() // accumulation}",
        f"gradient_accumulation_steps={accumulation}",
    ]


def modes(config_file: Path, root: Path) -> None:
    """Every mode from the start, with accumulation, recomputation and validation; then across modes."""
    wanted = ["hybrid", "copies"] if dist.get_world_size() == 4 else ["ddp", "copies", "full", "grad_op"]
    for name in wanted:
        accumulation = 2 if name in ("full", "copies") and dist.get_world_size() == 2 else 1
        options = [*MODES[name], *local_batch(accumulation), "gradient_clip=0.01"]
        if sharded := name not in ("ddp", "copies"):
            options += ["grad_checkpointing=True", "posthoc_ema.snapshot_every_steps=3"]
            options += ["grad_checkpointing_args.policy='selective'"] if name == "full" else []
        with shared_memory(root) if name == "copies" else contextlib.nullcontext():
            trainer = train(config_file, root / name, *options)
        assert isinstance(trainer.model, CopiedSums) == (name == "copies")
        parameter = next(trainer.state.network.parameters())
        assert isinstance(parameter, DTensor) == sharded
        if name == "hybrid":
            assert parameter.to_local().numel() <= parameter.numel() // 2 + parameter.numel() % 2
            assert parameter.device_mesh.shape == (2, 2)
    if dist.get_world_size() == 2:
        common = [*local_batch(), "gradient_clip=0.01", "save_model_steps=2"]
        train(config_file, root / "moved", "max_steps=2", *common)
        train(config_file, root / "moved", "max_steps=4", *MODES["full"], *common, resume=True)
        for name in ("ddp", "full"):
            options = ["max_steps=4", "mixed_precision='bf16'", "parallel.reduce_dtype='bf16'"]
            train(config_file, root / f"bf16-{name}", *MODES[name], *local_batch(), *options)


@contextlib.contextmanager
def shared_memory(folder: Path) -> Iterator[None]:
    """Gradients are averaged in memory that two processes share, as GPUs of a host do, in many buckets."""

    def memory(network: nn.Module, ranks: Ranks) -> PeerMemory:
        length, (host, rank) = sum(parameter.numel() for parameter in network.parameters()), divmod(ranks.rank, 2)
        files = [folder / f"gradients-{host}-{peer}" for peer in range(2)]
        mesh = init_device_mesh("cpu", (ranks.world_size // 2, 2))
        between, within = mesh.get_group(0), mesh.get_group(1)
        parts = [torch.from_file(str(file), shared=True, size=length) for file in files]
        return PeerMemory(rank, parts, lambda: dist.barrier(within), between=between if between.size() > 1 else None)

    with mock.patch.object(parallel, "peer_memory", memory), mock.patch.object(copied_sums, "BUCKET_VALUES", 5000):
        yield


def compiled(config_file: Path, root: Path) -> None:
    """Compiled blocks inside FSDP2, with recomputation."""
    options = ["compile=True", "grad_checkpointing=True", "max_steps=3", "save_model_steps=None"]
    train(config_file, root / "compiled", *MODES["full"], *local_batch(), *options)


def families(configs: Path, root: Path) -> None:
    """Families, after which their configs are named: under DDP, under shards, in two starts, with a step skipped."""
    for file in sorted(configs.glob("*.json")):
        folder, full = root / file.stem, MODES["full"]
        if dist.get_world_size() == 4:
            train_family(file, folder / "hybrid", *MODES["hybrid"], *local_batch())
            train_family(file, folder / "full", *full, *local_batch())
            continue
        train_family(file, folder / "ddp", *local_batch())
        train_family(file, folder / "moved", *local_batch(), "max_steps=2")
        train_family(file, folder / "moved", *MODES["grad_op"], *local_batch(), resume=True)
        full = [*full, *local_batch(2), "grad_checkpointing=True"]
        trainer = train_family(file, folder / "full", *full)
        assert all(isinstance(parameter, DTensor) for parameter in trainer.state.network.parameters())
        train_family(file, folder / "cut", *full, "max_steps=2")
        train_family(file, folder / "cut", *full, resume=True)
        train_family(file, folder / "skipped", *full, "max_steps=3", fault="nan@step=3,rank=1")


def train_family(file: Path, work_dir: Path, *options: str, fault: str = "", resume: bool = False) -> Trainer:
    os.environ["FAULT"] = fault
    config = load_config(file, options, notify=lambda line: None)
    family = family_named(file.stem, config)
    trainer = Trainer(
        config,
        family.objective,
        work_dir,
        reporting=Reporting(tensorboard=False),
        resume_from="latest" if resume else None,
        ranks=Ranks(),
        family=family,
    )
    trainer.fit()
    return trainer


def nan(config_file: Path, root: Path) -> None:
    """Step 3 is not finite on rank 1: by its loss, by its gradient alone, and under sharding."""
    train(config_file, root / "loss", *local_batch(2), fault="nan@step=3,rank=1,micro=1")
    train(config_file, root / "gradient", *local_batch(), fault="nan_grad@step=3,rank=1")
    train(config_file, root / "sharded", *MODES["full"], *local_batch(), fault="nan_grad@step=3,rank=1")
    train(config_file, root / "sgd", *local_batch(), *SGD, fault="nan_grad@step=3,rank=1")
    _expect(root / "stopped", config_file, "nan@rank=1", "health.max_skipped_in_a_row=3", "save_model_steps=1")


SGD = ["optimizer.type='SGD'", "optimizer.eps=None", "optimizer.lr=0.1", "optimizer.momentum=0.9"]


def unequal(config_file: Path, root: Path) -> None:
    """A weight of rank 1 changes after step 1; the check after step 1 finds it."""
    _expect(root / "unequal", config_file, "flip@step=1,rank=1")


def slow(config_file: Path, root: Path) -> None:
    """Rank 1 takes 120 ms longer a step: more than a busy machine adds to both."""
    train(config_file, root / "slow", *local_batch(), "max_steps=51", "log_interval=50", fault="slow@ms=120,rank=1")


def _expect(folder: Path, config_file: Path, fault: str, *options: str) -> None:
    """A run that fails; the error of every rank is left in the folder."""
    try:
        train(config_file, folder, *local_batch(), *options, fault=fault)
    except PixArtError as error:
        (folder / f"error-{dist.get_rank()}.txt").write_text(f"{error.exit_code} {error}")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for scenario in sys.argv[3:]:
        globals()[scenario](Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
