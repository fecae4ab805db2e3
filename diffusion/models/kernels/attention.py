"""Exact attention by a named kernel. Legend: B batch, H heads, N queries, M keys, L text tokens, c channels a head."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion.models.kernels.availability import can_run
from diffusion.models.kernels.choice import Kernels
from diffusion.models.kernels.heads import widened
from diffusion.models.kernels.products import attend_by_products, suits
from diffusion.models.kernels.text import TextLengths

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "fa3": SDPBackend.FLASH_ATTENTION,  # these two take the place of torch's own FLASH kernel
    "fa4": SDPBackend.FLASH_ATTENTION,
}
_TAKE_MASKS = ("efficient", "math")
# In the spare channel of a padded key; divided by sqrt(c) it is still far below any logit, and bf16 and fp16 hold it.
_AWAY = -20000.0


def attend(
    q: Tensor, k: Tensor, v: Tensor, kernels: Kernels, *, mask: Tensor | None = None, channels: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(channels)) v, by the kernel that `kernels.attention` names.

    Args:
        q: (B, N, H, c); k, v: (B, M, H, c). All are padded to kernels.head_width here if they are narrower.
        mask: (B, 1, 1, M) bool, True = keep. Kernels that take none leave such a call to torch's choice, and so do all
            where c is no multiple of 8.
        channels: those that hold something, of q, k and v that are padded already; None = c.
    Returns:
        (B, N, H, c).
    Raises:
        RuntimeError: the kernel does not take these inputs; torch says why.
    """
    given = q.shape[-1]
    channels = channels or given
    q, k, v = (widened(part, kernels.head_width).transpose(1, 2) for part in (q, k, v))  # (B, H, N, c)
    if kernels.attention == "products" and suits(q, k):
        return attend_by_products(q, k, v, mask, channels**-0.5).transpose(1, 2)[..., :given]
    scale = None if q.shape[-1] == channels else channels**-0.5
    with _kernel(kernels.attention, q, mask):
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return attended.transpose(1, 2)[..., :given]


def text_width(kernels: Kernels, channels: int, text: Tensor | TextLengths | None) -> tuple[int | None, float]:
    """Width of a query head, and the value of its first added channel, that `attend_text` works best with."""
    if kernels.text == "direct":
        return None, 0.0
    if kernels.text == "spare" and isinstance(text, Tensor):
        return kernels.head_width or -(-(channels + 1) // 8) * 8, 1.0
    return (None if isinstance(text, TextLengths) else kernels.head_width), 0.0


def attend_text(q: Tensor, pair: Tensor, text: Tensor | TextLengths | None, kernels: Kernels) -> Tensor:
    """Image tokens attend to the tokens of their caption.

    Args:
        q: (B, N, H, c), or wider as `text_width` says.
        pair: keys and values, (2, B, L, H, c), or (2, T, H, c) of packed captions.
        text: (B, 1, 1, L) bool, True = keep; None = all; or the lengths of packed captions.
    Returns:
        of the shape of q.
    """
    k, v = pair
    if isinstance(text, TextLengths):
        return _attend_packed(q, k, v, text, kernels)
    if kernels.text == "direct":
        if not _reads_masks(q):
            return attend(q, k, v, Kernels(kernels.attention), mask=text)
        from diffusion.models.kernels.few_keys import attend_few  # needs Triton

        return attend_few(q, pair, None if text is None else text[:, 0, 0])
    channels = k.shape[-1]
    width, spare = text_width(kernels, channels, text)
    if spare:
        # A padded key is pushed away in one channel, where each query holds 1. Both are constants without a gradient.
        away = torch.where(text[:, 0, 0, :, None, None], 0.0, _AWAY).to(k.dtype)  # type: ignore[index]
        k, text = torch.cat([k, away.expand(*k.shape[:-1], 1)], dim=-1), None
        q = widened(q, width, spare)
    k, v = (widened(part, q.shape[-1]) for part in (k, v))
    return attend(q, k, v, kernels, mask=text, channels=channels)


def _reads_masks(q: Tensor) -> bool:
    """Whether the kernels of `few_keys` are made for such queries."""
    return can_run(q.device) and (q.dtype in (torch.bfloat16, torch.float16) or not q.is_cuda) and q.shape[-1] <= 128


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, text: TextLengths, kernels: Kernels) -> Tensor:
    batch, length = q.shape[:2]
    if not q.is_cuda or q.dtype == torch.float32 or q.shape[-1] % 8:  # no kernel for it: with padding, and a mask
        place = torch.arange(text.longest, device=q.device)
        rows = (text.offsets[:-1, None] + place).clamp(max=k.shape[0] - 1)  # (B, L)
        mask = (place < text.offsets.diff()[:, None])[:, None, None]
        return attend(q, k[rows], v[rows], Kernels(kernels.attention), mask=mask)
    from torch.nn.attention.varlen import varlen_attn

    # The kernel leaves gradients of rows that belong to no caption as they are in memory; this makes them zero.
    inside = (torch.arange(k.shape[0], device=k.device) < text.offsets[-1])[:, None, None]
    k, v = (torch.where(inside, part, 0.0) for part in (k, v))
    starts = torch.arange(0, (batch + 1) * length, length, device=q.device, dtype=torch.int32)
    attended: Any = varlen_attn(q.flatten(0, 1), k, v, starts, text.offsets, length, text.longest)
    return attended.unflatten(0, (batch, length))


def _kernel(name: str, q: Tensor, mask: Tensor | None) -> Any:
    """The context in which SDPA uses a kernel and no other; the named ones are made for half precision on a GPU, and
    for heads of a multiple of 8 channels."""
    suits_it = q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0
    takes_it = suits_it and (mask is None or name in _TAKE_MASKS)
    return sdpa_kernel(_BACKENDS[name]) if name in _BACKENDS and takes_it else contextlib.nullcontext()
