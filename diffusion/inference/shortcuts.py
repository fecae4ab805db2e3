"""Savings that change the picture: guidance only in the first steps, and blocks whose work is used for several steps.

Both follow a fixed schedule, so they fit into a CUDA graph; methods that compare activations to decide do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusion.errors import PromptError
from diffusion.models import PixArt
from diffusion.models.pixart import TextSignal, TimeSignal


@dataclass(frozen=True)
class Shortcuts:
    """
    Args:
        guidance_until: share of the steps, from the first, that are guided; the others run the conditional half alone
            (after arXiv:2404.07724, which limits guidance to an interval).
        reuse_every: all blocks run in the first step, the last, and every `reuse_every`-th; in the others the first
            block alone, and what the rest added last time is added again (after arXiv:2312.00858). 1 = no reuse.
    Raises:
        PromptError: a value outside its range.
    """

    guidance_until: float = 1.0
    reuse_every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_until <= 1:
            raise PromptError(f"guidance_until={self.guidance_until!r} must lie in 0..1 (1 = all steps are guided)")
        if isinstance(self.reuse_every, bool) or not isinstance(self.reuse_every, int) or self.reuse_every < 1:
            raise PromptError(f"reuse_every={self.reuse_every!r} must be an integer of at least 1 (1 = no reuse)")

    def __bool__(self) -> bool:
        """Whether anything is saved."""
        return self != Shortcuts()

    def guides(self, step: int, steps: int) -> bool:
        """Whether step 0 .. steps - 1 is guided, where guidance is asked for."""
        return step < round(self.guidance_until * steps)

    def runs_all(self, step: int, steps: int) -> bool:
        """Whether all blocks run in this step."""
        return step % self.reuse_every == 0 or step == steps - 1


class ReusedBlocks:
    """The network with the work of all blocks but the first kept from one step for the next; for one picture."""

    def __init__(self, network: PixArt) -> None:
        self._network = network
        self._added: Tensor | None = None

    def predict(self, latents: Tensor, time: TimeSignal, text: TextSignal, *, anew: bool) -> Tensor:
        """As `PixArt.predict`; anew: run all blocks. Fewer rows than before are the last of those."""
        network, patch = self._network, self._network.config.patch_size
        grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
        first = network.run_blocks(network.embed_latents(latents), time, text, grid, span=slice(0, 1))
        if anew or self._added is None:
            tokens = network.run_blocks(first, time, text, grid, span=slice(1, None))
            self._added = tokens - first
        else:
            tokens = first + self._added[-len(first) :]
        return network.read_out(tokens, time, grid)
