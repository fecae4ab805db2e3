"""How a network is spread over processes: DDP, or FSDP2 in three forms (`parallel.strategy`)."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
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
from diffusion.models.cpu_linear import train_with_onednn
from diffusion.models.kernels import Kernels, use_fp8, use_kernels
from diffusion.objectives import OneStepNetworks
from diffusion.ranks import Ranks
from diffusion.training.copied_sums import BUCKET_MB, CopiedSums, peer_memory
from diffusion.training.run_log import LOGGER
from diffusion.training.sharding import is_sharded, keep_shell, mesh_of

AUTOCAST: dict[str, torch.dtype | None] = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def place(network: Any, config: TrainConfig, ranks: Ranks) -> Any:
    """Move the network of a run to the device; under FSDP2 each process keeps its shards. Comes before the optimiser.

    A block is a unit: it is gathered, used and, with full_shard and hybrid_shard, freed again. Of the blocks, what is
    gathered has the precision of autocast, which rounds the same matrices in DDP; all else stays float32.

    Raises:
        ConfigError: processes that do not divide into groups of parallel.shard_size.
    """
    network.train()
    choose_kernels(network, config, ranks.device)
    compile_blocks_of(network, config)
    if config.strategy == "ddp" or ranks.world_size == 1:
        return network.to(ranks.device)
    keep_shell(network)
    shard(network, device_mesh(config, ranks), config)
    return network


def place_frozen(network: Any, beside: nn.Module, config: TrainConfig) -> Any:
    """Move a network without gradients (a teacher, a target) to where the trained one is; shard and compile it as that.

    Args:
        network: on any device; on meta, its weights are then to be filled in.
        beside: the trained network, placed.
    """
    network.requires_grad_(False).eval()
    mesh, device = mesh_of(beside.parameters()), next(beside.parameters()).device
    use_kernels(network, kernels_of(config), device)
    compile_blocks_of(network, config)
    if mesh is not None:
        shard(network, mesh, config, frozen=True)
        network.register_forward_hook(lambda module, arguments, output: forget_forward(module))
    is_empty = next(network.parameters()).is_meta
    return network.to_empty(device=device) if is_empty else network.to(device)


def compile_blocks_of(network: Any, config: TrainConfig) -> None:
    """Compile a network if the config asks for it, once a bucket."""
    options: dict[str, Any] = {}
    if config.lora is not None and config.lora.use_dora:
        # torch 2.11 takes the norms of DoRA's weights for reductions that it could join, and fails (pytorch 177782).
        options["options"] = {"triton.mix_order_reduction": False}
    if config.compile:
        network.compile_blocks(dynamic=False, **options)


def shard(network: Any, mesh: DeviceMesh, config: TrainConfig, *, frozen: bool = False) -> None:
    """FSDP2 over each block, and over what is left of each network, with which the backward pass begins.

    Args:
        frozen: all of it is freed after each call under every strategy, since no backward pass would do it, and weights
            that an average moves would be out of date the next time. It is gathered in float32, since validation calls
            it without autocast.
    """
    reduce_dtype = _REDUCE[config.parallel.reduce_dtype]
    dtype, frees_blocks = AUTOCAST[config.mixed_precision], config.strategy != "shard_grad_op"
    of_rest = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    of_blocks = of_rest if frozen else MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
    parts: list[Any] = [*network.children()] if isinstance(network, OneStepNetworks) else [network]
    for part in parts:
        for block in part.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=frees_blocks or frozen, mp_policy=of_blocks)
        fully_shard(part, mesh=mesh, reshard_after_forward=frozen, mp_policy=of_rest)
    if not is_sharded(network):
        fully_shard(network, mesh=mesh, reshard_after_forward=frozen, mp_policy=of_rest)


def forget_forward(network: nn.Module) -> None:
    """Clear the list of units that FSDP2 keeps of each call until a backward pass, which a frozen network lacks."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            if state._fsdp_param_group is not None:
                state._fsdp_param_group._post_forward_indices.clear()


def choose_kernels(network: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Give a network the kernels of `config.kernels`, and the compiler its budget of activations.

    Raises:
        ConfigError: a package or layers that the choice needs are missing.
    """
    chosen = config.kernels
    try:
        use_kernels(network, kernels_of(config), device)
        if chosen.fp8 is not None:
            count = use_fp8(network, chosen.fp8, chosen.fp8_layers)
            LOGGER.info("FP8 (lossy): %d linear layers, scaled %s", count, chosen.fp8)
        if chosen.onednn and device.type == "cpu":
            train_with_onednn(network)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"kernels: {error}") from None
    recomputing = config.grad_checkpointing_args
    budget = recomputing.budget if config.grad_checkpointing and recomputing.policy == "budget" else 1.0
    torch._functorch.config.activation_memory_budget = budget  # type: ignore[attr-defined]


def kernels_of(config: TrainConfig) -> Kernels:
    """The choice of a config, less what changes the function (`fp8`) or layers (`onednn`)."""
    return Kernels(**{field.name: getattr(config.kernels, field.name) for field in fields(Kernels)})


def device_mesh(config: TrainConfig, ranks: Ranks) -> DeviceMesh:
    """One dimension of shards; hybrid_shard has copies times shards.

    Raises:
        ConfigError: processes that do not divide into groups of parallel.shard_size.
    """
    world = ranks.world_size
    if config.strategy != "hybrid_shard":
        return init_device_mesh(ranks.device.type, (world,), mesh_dim_names=("shard",))
    size = config.parallel.shard_size or ranks.local_world_size
    if world % size or world == size or size == 1:
        raise ConfigError(
            f"parallel.strategy='hybrid_shard' needs several groups of several processes, and {world} processes do not "
            f"make groups of parallel.shard_size={size}; choose a smaller divisor, or strategy='full_shard'"
        )
    return init_device_mesh(ranks.device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def wrap(network: nn.Module, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """What the objective calls: the network itself, or what sums gradients around it."""
    if ranks.world_size == 1 or is_sharded(network):
        return network
    parallel = config.parallel
    if parallel.sums_by == "copies" and parallel.reduce_dtype == "fp32" and (memory := peer_memory(network, ranks)):
        return CopiedSums(network, memory)
    if config.compile:  # dynamo would cut blocks at the borders of DDP's buckets; whole ones overlap with it as well
        torch._dynamo.config.optimize_ddp = False
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # The buffers are constants. torch 2.14 renamed the switch that copies them in every forward pass.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": devices, switch: False}
    # Gradients stay where they were summed: 4 bytes a parameter less memory, and no pass that copies them back.
    model = DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB, **options)
    if parallel.reduce_dtype == "bf16":
        model.register_comm_hook(None, bf16_compress_hook)
    return model


def synchronised_only_if(model: nn.Module, last: bool) -> Any:
    """Gradients are exchanged once a step, with the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, (CopiedSums, DistributedDataParallel)) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def repeatable_kernels(wanted: bool) -> Iterator[None]:
    """Inside, an operation that no kernel computes in one order of sums is an error that names it (CUDA)."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
