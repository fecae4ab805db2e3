"""Muon, which may be told on the device to leave a step out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Of the quintic that five iterations apply to the singular values, and what keeps a zero matrix finite.
_QUINTIC, _ITERATIONS, _TINY = (3.4445, -4.7750, 2.0315), 5, 1e-7


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T: (N, out, in) -> (N, out, in), singular values of 0.7 to 1.2.

    Newton and Schulz's iteration with the coefficients of Jordan et al. 2024; in bfloat16, but on CPUs in float32, as
    those without products of bfloat16 take 60 times as long for them.
    """
    a, b, c = _QUINTIC
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(_TINY)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups with `use_muon`, with updates of AdamW's size (arXiv:2502.16982).

    The other groups are AdamW's, fused. As there, a step changes nothing where the attribute `found_inf`, () on the
    device, is 1: the host launches the update without knowing, and so stays ahead of the device.

    Args:
        params: groups of parameters with `use_muon`; there, all dimensions but the first are a matrix's columns.
        momentum: of the groups with `use_muon`.
        betas, eps: of the others.
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float, *, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__([{"momentum": momentum, **group} for group in params], lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; returns what `closure`, which computes the gradients anew, returned."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        groups = self.param_groups
        for group in groups:
            if group["use_muon"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["use_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Matrices of one shape are updated together."""
        skip: Tensor | None = getattr(self, "found_inf", None)
        kept: Tensor | float = 1.0 if skip is None else 1 - skip
        by_shape: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[tuple(parameter.shape)].append(parameter)
        lr, momentum = group["lr"], group["momentum"]
        for shape, parameters in by_shape.items():
            buffers = [self._buffer(parameter) for parameter in parameters]
            gradients = torch.stack([gradient for one in parameters if (gradient := one.grad) is not None])
            averages = torch.stack(buffers)
            if skip is not None:
                gradients = torch.where(skip.bool(), 0, gradients)  # zero times NaN is NaN
            averages = averages.lerp_(gradients, (1 - momentum) * kept)
            torch._foreach_copy_(buffers, averages.unbind())
            update = orthogonalised(gradients.lerp_(averages, momentum).flatten(2)).to(gradients.dtype)
            rate = 0.2 * math.sqrt(max(shape[0], math.prod(shape[1:]))) * lr
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"] * kept)
            torch._foreach_add_(parameters, (update * (-rate * kept)).view_as(gradients).unbind())

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW looks for one in whatever is loaded
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def muon(
    model: nn.Module,
    groups: list[dict[str, Any]],
    lr: float,
    inside: str,
    *,
    eps: float,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Muon:
    """Muon on the matrices and kernels between hidden states, which orthogonal updates suit.

    Embeddings, the last layer, biases and tables are AdamW's.

    Args:
        groups: of parameters, with their weight decay.
        inside: what the names of the weights between hidden states contain.
        momentum, betas, eps: see `Muon`.
    """
    hidden = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if inside in name and parameter.ndim > 1 and not name.endswith("scale_shift_table")
    }
    split = [
        {**group, "params": chosen, "use_muon": use_muon}
        for group in groups
        for use_muon in (True, False)
        if (chosen := [parameter for parameter in group["params"] if (id(parameter) in hidden) == use_muon])
    ]
    return Muon(split, lr, momentum=momentum, betas=betas, eps=eps)
