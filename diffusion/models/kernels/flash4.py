"""FlashAttention-4 at the width of PixArt's heads, 72 channels, on Hopper cards.

Its kernels take heads of any multiple of 8 channels and fill up what is missing while they load. Backward, the kernel
that sums up the gradient of queries lays it out by multiples of 16 channels, but the one that reads the sums, by
multiples of 32, which are the same for widths of 64, 96 and 128 alone. Here the second one follows the first.
"""

from __future__ import annotations

from typing import Any

_MULTIPLE = 16  # channels


def mend() -> None:
    """Let FlashAttention-4 give right gradients at every width, in this process; doing it twice changes nothing."""
    from flash_attn.cute import interface

    plain: Any = getattr(interface, "FlashAttentionBackwardPostprocess", None)
    if plain is not None and plain.__module__ != __name__:
        interface.FlashAttentionBackwardPostprocess = _mended(plain)


def _mended(plain: Any) -> Any:
    class Postprocess(plain):  # type: ignore[misc]
        def __init__(self, dtype: Any, head_dim: int, arch: int, *args: Any, **options: Any) -> None:
            super().__init__(dtype, head_dim, arch, *args, **options)
            if arch // 10 == 9:
                self.tile_hdim = -(-head_dim // _MULTIPLE) * _MULTIPLE
                self.check_hdim_oob = head_dim != self.tile_hdim

    return Postprocess
