"""How a network is spread over processes: DDP, or FSDP2 in three forms (`parallel.strategy`)."""

from __future__ import annotations

import contextlib
import inspect
import os
from dataclasses import fields
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffusion.config import TrainConfig
from diffusion.errors import ConfigError
from diffusion.models import PixArt
from diffusion.models.kernels import Kernels, use_fp8, use_kernels
from diffusion.ranks import Ranks
from diffusion.training.run_log import LOGGER

AUTOCAST: dict[str, torch.dtype | None] = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BUCKET_MB = 100  # a block of XL/2 has 85; larger ones wait longer, smaller ones do not fill a fast link


def place(network: PixArt, config: TrainConfig, ranks: Ranks) -> PixArt:
    """Move a network to the device; under FSDP2 each process keeps its shards. Comes before the optimiser.

    A block is a unit: it is gathered, used and, with full_shard and hybrid_shard, freed again. Of the blocks, what is
    gathered has the precision of autocast, which rounds the same matrices in DDP; all else stays float32.

    Raises:
        ConfigError: processes that do not divide into groups of parallel.shard_size.
    """
    network.train()
    choose_kernels(network, config, ranks.device)
    if config.compile:
        network.compile_blocks(dynamic=False)  # one compilation a bucket
    if config.strategy == "ddp" or ranks.world_size == 1:
        return network.to(ranks.device)
    mesh, frees_blocks = device_mesh(config, ranks), config.strategy != "shard_grad_op"
    reduce_dtype = _REDUCE[config.parallel.reduce_dtype]
    precision = MixedPrecisionPolicy(AUTOCAST[config.mixed_precision], reduce_dtype, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=frees_blocks, mp_policy=precision)
    rest = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    fully_shard(network, mesh=mesh, reshard_after_forward=False, mp_policy=rest)
    return network


def choose_kernels(network: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Give a network the kernels of `config.kernels`, and the compiler its budget of activations.

    Raises:
        ConfigError: a package or layers that the choice needs are missing.
    """
    chosen = config.kernels
    try:
        names = {field.name: getattr(chosen, field.name) for field in fields(Kernels)}
        use_kernels(network, Kernels(**names), device)
        if chosen.fp8 is not None:
            count = use_fp8(network, chosen.fp8, chosen.fp8_layers)
            LOGGER.info("FP8 (lossy): %d linear layers, scaled %s", count, chosen.fp8)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"kernels: {error}") from None
    recomputing = config.grad_checkpointing_args
    budget = recomputing.budget if config.grad_checkpointing and recomputing.policy == "budget" else 1.0
    torch._functorch.config.activation_memory_budget = budget  # type: ignore[attr-defined]


def device_mesh(config: TrainConfig, ranks: Ranks) -> DeviceMesh:
    """One dimension of shards; hybrid_shard has copies times shards.

    Raises:
        ConfigError: processes that do not divide into groups of parallel.shard_size.
    """
    world = ranks.world_size
    if config.strategy != "hybrid_shard":
        return init_device_mesh(ranks.device.type, (world,), mesh_dim_names=("shard",))
    size = config.parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % size or world == size or size == 1:
        raise ConfigError(
            f"parallel.strategy='hybrid_shard' needs several groups of several processes, and {world} processes do not "
            f"make groups of parallel.shard_size={size}; choose a smaller divisor, or strategy='full_shard'"
        )
    return init_device_mesh(ranks.device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def wrap(network: PixArt, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """What the objective calls: the network itself, or DDP around it."""
    if ranks.world_size == 1 or isinstance(network, FSDPModule):
        return network
    if config.compile:  # dynamo would cut blocks at the borders of DDP's buckets; whole ones overlap with it as well
        torch._dynamo.config.optimize_ddp = False
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # The buffers are constants. torch 2.14 renamed the switch that copies them in every forward pass.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": devices, switch: False}
    # Gradients stay where they were summed: 4 bytes a parameter less memory, and no pass that copies them back.
    model = DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=_BUCKET_MB, **options)
    if config.parallel.reduce_dtype == "bf16":
        model.register_comm_hook(None, bf16_compress_hook)
    return model


def synchronised_only_if(model: nn.Module, last: bool) -> Any:
    """Gradients are exchanged once a step, with the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()
