"""Triton kernel of an optimiser step: clipping, AdamW (arXiv:1711.05101) and the average of the weights in one pass."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _numbers(address):
    """Where float32 numbers begin, at a multiple of 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _load(base, at, count, WHOLE: tl.constexpr):
    return tl.load(base + at) if WHOLE else tl.load(base + at, mask=at < count, other=0.0)


@triton.jit
def _store(base, at, values, count, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(base + at, values)
    else:
        tl.store(base + at, values, mask=at < count)


@triton.jit
def _update(place, gradients, at, count, decay, facts, lr, new1, beta2, new2, eps, weight, WHOLE: tl.constexpr):
    values, firsts, seconds = _numbers(tl.load(place)), _numbers(tl.load(place + 1)), _numbers(tl.load(place + 2))
    averages = tl.load(place + 3)
    gradient = _load(gradients, at, count, WHOLE) * tl.load(facts + 1)
    first = _load(firsts, at, count, WHOLE)
    first += new1 * (gradient - first)
    second = beta2 * _load(seconds, at, count, WHOLE) + new2 * gradient * gradient
    root = tl.sqrt(second) / tl.sqrt(tl.load(facts + 3)) + eps
    value = (1.0 - lr * decay) * _load(values, at, count, WHOLE) - lr / tl.load(facts + 2) * first / root
    _store(values, at, value, count, WHOLE)
    _store(firsts, at, first, count, WHOLE)
    _store(seconds, at, second, count, WHOLE)
    if averages != 0:
        average = _load(_numbers(averages), at, count, WHOLE)
        _store(_numbers(averages), at, average + weight * (value - average), count, WHOLE)


@triton.jit
def adamw(places, gradients, decays, blocks, facts, lr, new1, beta2, new2, eps, weight, BLOCK: tl.constexpr):
    """One block of one tensor; all tensors are float32.

    Args:
        places: (tensors, 5) int64: where values, first and second moments and averages (0 = none) lie, and how many.
        gradients: (tensors,) int64, where they lie.
        decays: (tensors,) float32, weight decay.
        blocks: (programs, 2) int32: the tensor, and the block's number in it.
        facts: (4,) float32: 1 = this step is left out; factor of the gradients; 1 - beta^step of both moments.
        new1, new2: 1 - beta of both moments, which a float32 beta would give to 4 digits.
        weight: of the new values in the averages.
    """
    tensor, block = tl.load(blocks + 2 * tl.program_id(0)), tl.load(blocks + 2 * tl.program_id(0) + 1)
    if tl.load(facts) == 0:
        place, decay = places + 5 * tensor, tl.load(decays + tensor)
        gradient, count = _numbers(tl.load(gradients + tensor)), tl.load(place + 4)
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= count:
            _update(place, gradient, at, count, decay, facts, lr, new1, beta2, new2, eps, weight, True)
        else:
            _update(place, gradient, at, count, decay, facts, lr, new1, beta2, new2, eps, weight, False)
