"""Does a step count? Decided on the device for all processes alike, and read by the host when that costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.ranks import Ranks


@dataclass(frozen=True)
class StepFacts:
    """Of one step: loss (mean over processes), gradient norm before clipping, ranks where one of them is not finite."""

    loss: float
    grad_norm: float
    bad_losses: tuple[int, ...]
    bad_norms: tuple[int, ...]

    @property
    def skipped(self) -> bool:
        """Whether the update was left out."""
        return bool(self.bad_losses or self.bad_norms)


class Verdict:
    """A step is skipped on all processes if the loss or the gradient norm of one of them is not finite.

    One all-reduce of two numbers a process and step. The copy to the host is asynchronous: whoever reads it while the
    next step is queued on the device waits for this one to end, and the device does not wait at all.

    Args:
        step: 1 = the first of the run.
        loss, norm: () on the device, of this process's part of the batch and of all gradients.
    """

    def __init__(self, step: int, loss: Tensor, norm: Tensor, ranks: Ranks) -> None:
        self.step = step
        loss, norm = loss.detach().float(), norm.detach().float()
        shared = torch.zeros(1 + 2 * ranks.world_size, device=loss.device)
        shared[0] = loss / ranks.world_size
        shared[1 + ranks.rank :: ranks.world_size] = (~torch.isfinite(torch.stack([loss, norm]))).float()
        shared = ranks.total(shared)
        self.skip = shared[1:].amax().clamp(max=1)  # () float32, 0 or 1, equal on all processes
        self.loss, self.norm = shared[0], norm
        values = torch.cat([norm[None], shared])
        self._host, self._copied = values, None
        if values.is_cuda:
            self._host = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepFacts:
        """The facts on the host; waits until the device has passed this step's gradients."""
        if self._copied is not None:
            self._copied.synchronize()
        norm, loss, *flags = self._host.tolist()
        world = len(flags) // 2
        bad = [rank for rank, flag in enumerate(flags) if flag]
        return StepFacts(loss, norm, tuple(r for r in bad if r < world), tuple(r - world for r in bad if r >= world))
