"""The GELU (tanh) of Triton kernels."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_and_slope(h):
    """gelu(h) = h s, with s = sigmoid(2 u), u = sqrt(2 / pi) (h + 0.044715 h^3); and its derivative."""
    s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    return h * s, s + h * s * (1.0 - s) * slope
