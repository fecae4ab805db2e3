"""The end of a step in one pass over memory: gradients clipped, AdamW, average of the weights.

Apart, these are three passes, of which each reads and writes all gradients, weights or averages again.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.devices import sent
from diffusion.models.kernels.availability import can_run
from diffusion.training.optimization import WeightAverage
from diffusion.training.sharding import live_tensors, mesh_of

_BLOCK = 4096  # numbers that a program updates
_ALIGNMENT = 16  # bytes


class FusedUpdate:
    """A step of `torch.optim.AdamW`, whose state stays as torch keeps it, and of a `WeightAverage`.

    It is made for whole float32 weights on one card. All else is left to torch, and so is the first step, which makes
    the optimiser's state.

    Args:
        average: of the network's weights; None = none is kept.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None) -> None:
        self._optimizer, self._average = optimizer, average
        self._parameters: list[Tensor] = [*chain(*(group["params"] for group in optimizer.param_groups))]
        names = {id(tensor): name for name, tensor in live_tensors(network).items()}
        held = set() if average is None else {key for key, tensor in average.tensors.items() if _is_plain(tensor)}
        self._keys = [names.get(id(parameter)) for parameter in self._parameters]
        self.averaged = frozenset(key for key in self._keys if key in held)  # what a step brings up to date
        self._layout: list[Tensor] | None = None
        self._laid_out_for: list[Any] = []

    def __call__(self, skip: Tensor, norm: Tensor, clip: float | None) -> bool:
        """Update everything, or nothing where `skip` is 1; returns False where it is left to torch.

        Args:
            skip: () float32 on the device, 0 or 1. norm: () of all gradients. clip: what it may be at most.
        """
        gradients = [parameter.grad for parameter in self._parameters]
        if not (self._suits() and all(map(_fit, gradients, self._parameters))):
            return False
        from diffusion.models.kernels.update_triton import adamw  # needs Triton

        group, device = self._optimizer.param_groups[0], skip.device
        places, decays, blocks, betas = self._lay_out(device)
        steps = [self._optimizer.state[parameter]["step"] for parameter in self._parameters]
        torch._foreach_add_(steps, 1 - skip)
        factor = torch.ones_like(skip) if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
        facts = torch.cat([torch.stack([skip, factor.float()]), (1 - betas ** steps[0].double()).float()])
        addresses = sent([gradient.data_ptr() for gradient in gradients], torch.int64, device)  # type: ignore[union-attr]
        weight = 0.0 if self._average is None else self._average.next_weight
        beta1, beta2 = group["betas"]
        adamw[(len(blocks),)](
            places, addresses, decays, blocks, facts, group["lr"], 1 - beta1, beta2, 1 - beta2, group["eps"], weight,
            BLOCK=_BLOCK,
        )  # fmt: skip
        return True

    def _suits(self) -> bool:
        """Whether optimiser and weights are what the kernel is made for."""
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        shared = {(group["lr"], tuple(group["betas"]), group["eps"]) for group in groups}
        plain = not any(group[option] for group in groups for option in ("amsgrad", "maximize"))
        if type(optimizer) is not torch.optim.AdamW or len(shared) > 1 or not plain:
            return False
        if not can_run(self._parameters[0].device) or mesh_of(self._parameters) is not None:
            return False
        return all(map(_is_plain, self._parameters)) and all(optimizer.state[each] for each in self._parameters)

    def _lay_out(self, device: torch.device) -> list[Tensor]:
        """Arguments of the kernel that stay as they are for as long as no tensor is replaced."""
        held = {} if self._average is None else self._average.tensors
        rows = []
        for parameter, key in zip(self._parameters, self._keys):
            state = self._optimizer.state[parameter]
            tensors = [parameter, state["exp_avg"], state["exp_avg_sq"]]
            average = [held[key].data_ptr() if key in self.averaged else 0]  # type: ignore[index]
            rows.append([*(tensor.data_ptr() for tensor in tensors), *average, parameter.numel()])
        groups = self._optimizer.param_groups
        decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        if self._layout is None or self._laid_out_for != [rows, decays]:
            blocks = [(index, block) for index, row in enumerate(rows) for block in range(-(-row[-1] // _BLOCK))]
            self._layout = [
                sent(rows, torch.int64, device),
                sent(decays, torch.float32, device),
                sent(blocks, torch.int32, device),
                sent(groups[0]["betas"], torch.float64, device),
            ]
            self._laid_out_for = [rows, decays]
        return self._layout


def _is_plain(tensor: Tensor) -> bool:
    """Whether the kernel can take the numbers as they lie."""
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _fit(gradient: Tensor | None, parameter: Tensor) -> bool:
    return gradient is not None and _is_plain(gradient) and gradient.shape == parameter.shape
