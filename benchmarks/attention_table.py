"""Attention kernels on this card: useful TFLOP/s of each, forward and backward, for the shapes of training.

Useful FLOPs are those of heads of 72 channels, whatever the kernel pads them to: 4 B H N M 72 forward and 10 backward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from timing import timed

from diffusion.errors import first_line
from diffusion.models.kernels import Kernels, attend, attend_text, text_width, use_kernels
from diffusion.models.kernels.choice import is_installed
from diffusion.models.kernels.text import TextLengths

HEADS, CHANNELS, TEXT = 16, 72, 120
SHAPES = ((128, 256), (32, 1024), (8, 4096))  # batch, image tokens: 256, 512 and 1024 px
ATTENTIONS = ("cudnn", "flash", "efficient", "fa3", "fa4")
WIDTHS = (None, 80, 96, 128)


class _Choice(torch.nn.Module):
    """Something that `use_kernels` can be asked to prepare."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self.kernels = Kernels()
        self.place = torch.nn.Parameter(torch.zeros(1, device=device))


def measure_attention(device: Any, *, repeats: int = 20, tiny: bool = False) -> list[dict[str, Any]]:
    """One row a shape, kernel and width; a kernel that refuses a shape says why."""
    shapes, names = (((1, 16),), ("torch", "math")) if tiny else (SHAPES, ATTENTIONS)
    choice = _Choice(device)
    rows = []
    for name in names:
        if not is_installed(name):
            rows.append({"attention": name, "error": "not installed"})
            continue
        for batch, tokens in shapes:
            for what, kernels, text in _cases(name, batch, device):
                row = {"what": what, "attention": name, "width": kernels.head_width, "batch": batch, "tokens": tokens}
                try:
                    use_kernels(choice, kernels)  # a package may be wrong at some widths, and is refused there
                    rows.append({**row, **_rates(device, kernels, text, batch, tokens, repeats)})
                except RuntimeError as error:
                    rows.append({**row, "error": first_line(error)[:120]})
                print(rows[-1], flush=True)
        if name in ("fa3", "fa4"):
            torch.nn.attention.restore_flash_attention_impl()
    return rows


def _cases(name: str, batch: int, device: Any) -> Iterator[tuple[str, Kernels, Any]]:
    """Self-attention at each width; captions of all lengths, with a mask tensor, a spare channel, and packed."""
    for width in WIDTHS:
        yield "self", Kernels(attention=name, head_width=width), None
    lengths = torch.linspace(1, TEXT, batch, device=device).long()
    mask = (torch.arange(TEXT, device=device) < lengths[:, None])[:, None, None]
    if name in ("cudnn", "efficient", "torch"):
        yield "text, mask", Kernels(attention=name), mask
    yield "text, spare", Kernels(attention=name, text="spare"), mask
    if name == "torch":
        yield "text, direct", Kernels(text="direct"), mask
    if name in ("flash", "torch"):
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        yield "text, packed", Kernels(attention=name, text="packed"), TextLengths(offsets, TEXT)


def _rates(device: Any, kernels: Kernels, text: Any, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_self = text is None
    keys = tokens if is_self else TEXT
    width = kernels.head_width or CHANNELS if is_self else text_width(kernels, CHANNELS, text)[0] or CHANNELS
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    q = make(batch, tokens, HEADS, width)
    shape = (int(text.offsets[-1]),) if isinstance(text, TextLengths) else (batch, keys)
    pair = make(2, *shape, HEADS, width if is_self else CHANNELS)
    if width > CHANNELS:  # what a projection with padded weights gives
        q[..., CHANNELS:] = 0
        if is_self:
            pair[..., CHANNELS:] = 0
        elif kernels.text == "spare":
            q[..., CHANNELS] = 1
    parts = [part.requires_grad_() for part in (q, *(pair if is_self else [pair]))]

    def forward() -> torch.Tensor:
        if is_self:
            return attend(*parts, kernels, channels=CHANNELS)
        return attend_text(*parts, text, kernels)

    def forward_loop() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                forward()

    def both_loop() -> None:
        for _ in range(repeats):
            torch.autograd.grad(forward(), parts, grad)

    grad = torch.randn_like(forward())
    forward_loop()
    both_loop()
    ahead = min(timed(device, forward_loop) for _ in range(3)) / repeats
    both = min(timed(device, both_loop) for _ in range(3)) / repeats
    flops = 4 * batch * HEADS * tokens * keys * CHANNELS  # padding of captions is counted, so that rows compare
    back = max(both - ahead, 1e-9)
    return {
        "forward_ms": round(1e3 * ahead, 4),
        "backward_ms": round(1e3 * back, 4),
        "forward_tflops": round(flops / ahead / 1e12, 2),
        "backward_tflops": round(2.5 * flops / back / 1e12, 2),
    }
