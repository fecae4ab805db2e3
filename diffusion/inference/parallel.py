"""Each picture drawn by several processes together: guidance halves apart, tokens shared out.

Legend: B rows (pictures, twice that with guidance), C latent channels, h x w latent size, P processes of a sequence.
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from diffusion.errors import ConfigError, PromptError
from diffusion.models import ControlPixArt, PixArt, TokenSharing
from diffusion.models.pixart import PixArtConfig, TextSignal, TimeSignal
from diffusion.ranks import Ranks


class SharedForward:
    """A network as solvers ask it, its passes done by all processes of a start; each gets the whole result.

    Rows go to `row_groups` groups of processes (with guidance two groups: the unconditional half and the conditional
    one), and within a group the tokens of a picture are shared out (see `TokenSharing`). All processes call it with
    equal arguments. The network is changed by it: it belongs to this way of drawing until `end`.

    Args:
        network: whole on every process.
        row_groups: divides the number of processes; None = 2, or 1 if that is odd.
    Raises:
        ConfigError: processes that do not divide into groups.
    """

    def __init__(self, network: PixArt | ControlPixArt, ranks: Ranks, *, row_groups: int | None = None) -> None:
        self.network, self.ranks = network, ranks
        self.row_groups = row_groups or (1 if ranks.world_size % 2 else 2)
        self.sequence, rest = divmod(ranks.world_size, self.row_groups)
        if rest:
            raise ConfigError(f"{ranks.world_size} processes do not make {self.row_groups} groups of one size")
        self._row_group = ranks.rank // self.sequence
        self._sharing: TokenSharing | None = None
        if self.sequence > 1:
            starts = range(0, ranks.world_size, self.sequence)
            groups = [dist.new_group(list(range(start, start + self.sequence))) for start in starts]  # by all, in order
            self._sharing = TokenSharing(cast(dist.ProcessGroup, groups[self._row_group]))
        network.share_tokens(self._sharing)

    def end(self) -> None:
        """Give the network back to calls of this process alone."""
        self.network.share_tokens(None)

    @property
    def config(self) -> PixArtConfig:
        """Of the network."""
        return self.network.config

    def embed_time(self, timesteps: Tensor, **sizes: Tensor | None) -> TimeSignal:
        """See `PixArt.embed_time`; of all rows."""
        return self.network.embed_time(timesteps, **sizes)

    def with_tables(self, time: TimeSignal) -> TimeSignal:
        """See `PixArt.with_tables`."""
        return self.network.with_tables(time)

    def embed_text(
        self, caption_embeds: Tensor, caption_mask: Tensor | None, *, project: bool = False, alone: int = 0
    ) -> TextSignal:
        """See `PixArt.embed_text`; of the rows that this process draws. Raises PromptError when rows do not divide."""
        self._check_rows(len(caption_embeds))
        alone = alone if self.row_groups == 1 else 0  # a group may have no other rows
        parts = self._part(caption_embeds), self._part(caption_mask)
        return self.network.embed_text(*parts, project=project, alone=alone)

    def predict(self, latents: Tensor, time: TimeSignal, text: TextSignal, **options: Any) -> Tensor:
        """See `PixArt.predict`: (B, C, h, w) -> (B, C_out, h, w).

        Args:
            text: of `embed_text`. options: control_latents (B, C, h, w) and condition_strength of a ControlNet.
        Raises:
            PromptError: rows or a height that do not divide.
        """
        self._check_rows(len(latents))
        self._check_height(latents.shape[2])
        if len(time.modulation) > 1:  # a single row serves all
            time = TimeSignal(*map(self._part, time))
        options = {name: self._part(value) for name, value in options.items()}
        mine = self.network.predict(self._part(latents), time, text, **options).contiguous()
        parts = mine.new_empty(self.ranks.world_size, *mine.shape)
        dist.all_gather(list(parts), mine)  # (ranks, B / groups, C_out, h / P, w)
        whole = parts.unflatten(0, (self.row_groups, self.sequence)).permute(0, 2, 3, 1, 4, 5)
        return whole.flatten(3, 4).flatten(0, 1)

    def _part(self, value: Any) -> Any:
        """What this process needs of an argument: its rows, and its strip of what is a picture (B, C, h, w)."""
        if not isinstance(value, Tensor):
            return value
        rows = value.chunk(self.row_groups)[self._row_group]
        return self._sharing.strip(rows, dim=2) if self._sharing is not None and rows.ndim == 4 else rows

    def _check_rows(self, rows: int) -> None:
        if rows % self.row_groups:
            raise PromptError(
                f"a batch of {rows} without guidance does not divide by {self.row_groups} groups of processes; draw a "
                f"multiple of {self.row_groups} at a time, or share the tokens alone (row_groups=1)"
            )

    def _check_height(self, height: int) -> None:
        config = self.network.config
        unit = config.patch_size * self.sequence * (config.kv_compress.scale_factor if config.kv_compress else 1)
        if height % unit:
            raise PromptError(
                f"latents of {height} rows do not divide by {unit} ({self.sequence} processes share them); draw a "
                f"height that is a multiple of {8 * unit} px, or start fewer processes"
            )


def processes_of_start(device: str) -> Ranks | None:
    """The processes that a launcher (torchrun) started together with this one; None = this one alone."""
    return Ranks(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
