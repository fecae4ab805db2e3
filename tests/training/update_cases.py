"""AdamW with clipping and an average, by the fused kernel and by torch: for Triton's interpreter and a card."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.training.fused_update import FusedUpdate
from diffusion.training.optimization import WeightAverage
from diffusion.training.state import RunState


class Verdict:
    """What an update reads of one."""

    def __init__(self, skip: bool, norm: Tensor) -> None:
        self.skip, self.norm = torch.tensor(float(skip), device=norm.device), norm


def network(device: str) -> nn.Module:
    """Weights of more and of less than a block of the kernel, with numbers that fill none."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(70, 130), nn.GELU(), nn.Linear(130, 3), nn.BatchNorm1d(3))
    return module.to(device)


def run(module: nn.Module, fused: bool, steps: int, skipped: int | None, clip: float | None) -> RunState:
    """State after so many steps on gradients that grow; step `skipped` has some that are not finite."""
    groups = [{"params": list(module[0].parameters()), "weight_decay": 0.1}, {"params": list(module[2].parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0, eps=1e-10, fused=True)
    average = WeightAverage(module, 0.9)
    state = RunState(module, optimizer, torch.amp.GradScaler("cpu", enabled=False), average)  # type: ignore[arg-type]
    update = FusedUpdate(module, optimizer, average) if fused else None
    generator = torch.Generator().manual_seed(1)
    parameters = [*module[0].parameters(), *module[2].parameters()]
    for step in range(steps):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator) * (step + 1)
            parameter.grad = gradient.to(parameter) * (float("nan") if step == skipped else 1.0)
        norm = torch.cat([parameter.grad.double().flatten() for parameter in parameters]).norm()
        verdict: Any = Verdict(step == skipped, norm.float())  # in float32 a CPU's norm is not a card's
        state.fused_update = update
        state.update(verdict, clip)
        if step != skipped:
            average.update(module, done=state._averaged)
        assert bool(state._averaged) == (fused and step > 0), "the first step is torch's"
    return state


def difference(device: str, steps: int = 5, skipped: int | None = 3, clip: float | None = 20.0) -> float:
    """The largest relative difference of weights, moments, step counts and average.

    Torch's step is taken on a CPU: its kernel for cards subtracts beta2 from 1 in float32, so that its second moments
    are 1.3e-5 too small.
    """
    arms = ((device, True), ("cpu", False))
    ours, plain = (run(network(where), fused, steps, skipped, clip) for where, fused in arms)
    pairs = zip(tensors(ours), tensors(plain), strict=True)
    return max(((one - other).norm() / other.norm().clamp(min=1e-9)).item() for one, other in pairs)


def tensors(state: RunState) -> list[Tensor]:
    found = [*state.network.state_dict().values(), *state.average.tensors.values()]  # type: ignore[union-attr]
    for values in state.optimizer.state.values():
        found += [*values.values()]
    return [copy.copy(tensor).detach().double().cpu() for tensor in found]
