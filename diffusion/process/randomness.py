"""Random draws as pure functions of (seed, purpose, global sample number).

Training draws nothing from a global generator: the noise of sample 12,345 is the same whatever the number of
processes, the batch it falls in, or the number of restarts. There is therefore almost no random state to save.

Bits come from a counter hashed by the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied twice; integer
arithmetic is exact on every device, so CPU and GPU draw the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch takes."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not sign-extending) shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little")


def keyed_bits(seed: int, purpose: str, sample_numbers: Tensor, count: int) -> Tensor:
    """(B,) int64 sample numbers -> (B, count) int64 of uniform bits, on their device."""
    stream = _mix((sample_numbers.long() + 1) * _signed(_GOLDEN) + _signed(_key(seed, purpose)))  # (B,)
    counter = torch.arange(1, count + 1, device=sample_numbers.device, dtype=torch.int64) * _signed(_GOLDEN)
    return _mix(_mix(stream[:, None] + counter))


def keyed_uniform(seed: int, purpose: str, sample_numbers: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform in [0, 1): (B,) -> (B, *shape) float32, multiples of 2^-24."""
    bits = keyed_bits(seed, purpose, sample_numbers, math.prod(shape))
    return (_shift_right(bits, 40).float() * 2.0**-24).reshape(-1, *shape)


def keyed_normal(seed: int, purpose: str, sample_numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal: (B,) -> (B, *shape) float32, by Box-Muller."""
    count = math.prod(shape)
    bits = keyed_bits(seed, purpose, sample_numbers, (count + 1) // 2)
    # One 64-bit word gives both uniforms; the first is in (0, 1], so its logarithm is finite.
    radius = (-2 * ((_shift_right(bits, 40).float() + 1) * 2.0**-24).log()).sqrt()
    angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return normals[:, :count].reshape(-1, *shape)


def keyed_integer(seed: int, purpose: str, sample_number: int, high: int) -> int:
    """One integer in [0, high), without torch tensors: for data loader workers."""
    if high < 1:
        raise ValueError(f"high={high} must be at least 1")
    stream = _mix_int(((sample_number + 1) * _GOLDEN + _key(seed, purpose)) & _MASK)
    return (_mix_int(_mix_int((stream + _GOLDEN) & _MASK)) >> 11) % high
