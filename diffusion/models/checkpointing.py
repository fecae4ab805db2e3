"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# The expensive operations of a block. Their outputs are kept; norms, modulation and activation functions, which cost
# memory traffic but hardly any arithmetic, are computed again. SDPA is one of several, by device, dtype and mask.
_KEPT = frozenset(["pixart::onednn_linear"]) | frozenset(
    f"aten::{name}"
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)


def recompute(block: nn.Module, *arguments: Any, selective: bool = False) -> Tensor:
    """Run a block whose activations are computed again in the backward pass.

    Args:
        selective: keep the outputs of matrix products and attention.
    """
    # Blocks draw no random numbers; reading the generator's state is not possible while a CUDA graph is recorded.
    if not selective:
        output: Tensor = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return output
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    output = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return output


def _policy(context: Any, operator: torch._ops.OpOverload, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name().split(".")[0] in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
