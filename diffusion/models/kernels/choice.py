"""Which form of an operation a network uses, and which attention a card is best at."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion.errors import first_line
from diffusion.models.kernels.availability import can_run, kept_in
from diffusion.models.kernels.flash4 import mend

ATTENTIONS = ("torch", "auto", "cudnn", "flash", "efficient", "math", "products", "fa3", "fa4")
TEXTS = ("mask", "spare", "packed", "direct")
MLPS = ("torch", "auto", "cublas", "quack")
LOGGER = logging.getLogger(__name__)
# Module and name of what kernels come in.
_PACKAGES = {
    "fa3": ("flash_attn_interface", "flash-attn-3"),
    "fa4": ("flash_attn.cute", "flash-attn-4"),
    "quack": ("quack", "quack-kernels"),
}

# Best first, by compute capability and by image tokens: (fewest tokens, attention, width of a head). Heads of 72
# channels cost most kernels what 80 or 96 do. `benchmarks/bench_training_levers.py --parts attention` measures a card.
# FlashAttention-4 as it comes (b18) is right on Hopper at 96, and forward at 72 and 80; see `flash4.py`.
_BEST: dict[int, tuple[tuple[int, str, int | None], ...]] = {
    9: ((512, "fa4", None), (512, "fa4", 96), (0, "cudnn", None)),
}
_BEST_IN_DRAWING: dict[int, tuple[tuple[int, str, int | None], ...]] = {
    9: ((1024, "fa4", None), (2048, "fa4", 80), (0, "cudnn", None)),
}
_LARGEST_ERROR = 0.02  # in bf16; kernels that are right stay below 0.005
_FEWEST_FOR_QUACK = 1024  # image tokens, in drawing; with fewer, compiling its kernel takes longer than it saves


@dataclass(frozen=True)
class Kernels:
    """Forms of the operations of a block. The default is plain torch, with the numbers it always had.

    Args:
        attention: "torch" (SDPA as torch chooses), one named kernel of SDPA ("cudnn", "flash", "efficient", "math"),
            FlashAttention "fa3" or "fa4" (packages of their own), or "auto": what is measured to be the best on the
            card.
        head_width: channels that a head is padded to with zeros, for kernels that are made for certain widths; None =
            as it is. Exact: padded weights have no gradient.
        text: how cross-attention leaves out padding: "mask" (a mask tensor, which keeps SDPA from its fastest kernels),
            "spare" (a spare channel pushes padded keys away; no mask tensor), "packed" (captions of different lengths
            one after another, without padding), "direct" (Triton kernels that read the mask, on a GPU).
        fused: norm, modulation, gate, residual and GELU as Triton kernels with one pass each way, on a GPU.
        mlp: the feed-forward layer by "torch", or with the GELU inside its products: "cublas" (without gradients alone,
            else as "torch"), "quack" (a package of its own, on Hopper cards, for half precision), or "auto": "quack"
            where it is installed and pays, else what needs no package.
        bf16_stream: keep the tokens between blocks in bfloat16 under bf16 autocast, instead of float32.
    """

    attention: str = "torch"
    head_width: int | None = None
    text: str = "mask"
    fused: bool = False
    mlp: str = "torch"
    bf16_stream: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("attention", ATTENTIONS), ("text", TEXTS), ("mlp", MLPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")


def use_kernels(
    network: nn.Module, kernels: Kernels, device: torch.device | None = None, *, gradients: bool = True
) -> None:
    """Let a network compute by these kernels; "auto" is decided for its training size.

    Args:
        network: all of it that has a `kernels` attribute gets the choice.
        device: where it will run; None = where it is.
        gradients: whether it will be trained. Where not, and captions are packed, "auto" takes no package: a recorded
            graph with the kernels of FlashAttention-4 b18 for lengths that differ crashed.
    Raises:
        RuntimeError: a package that the choice needs is missing, or fails.
    """
    device = device or next(network.parameters()).device
    config: Any = getattr(network, "config", None)
    decided = decide(kernels, device, config.base_size**2 if config is not None else 0, gradients=gradients)
    if can_run(device):  # not while the compiler reads a block
        for name, is_used in (("fused", decided.fused), ("qkv", decided.fused), ("few_keys", decided.text == "direct")):
            if is_used:
                importlib.import_module(f"diffusion.models.kernels.{name}")
    if device.type == "cuda":
        if kernels.attention != "auto":  # whose choice has been activated where it was tried
            _activate(decided.attention, decided.head_width, device, gradients)
        if kernels.mlp == "quack":
            _activate_quack(device)
    for module in network.modules():
        if hasattr(module, "kernels"):
            module.kernels = decided  # type: ignore[assignment]


def decide(kernels: Kernels, device: torch.device, num_tokens: int, *, gradients: bool = True) -> Kernels:
    """The same choice with "auto" replaced by what is best on a device, and without what it cannot do, said once."""
    if kernels.fused and not can_run(device) and device.type != "cpu":
        LOGGER.info("fused kernels need CUDA and Triton; the blocks compute in plain torch")
        kernels = replace(kernels, fused=False)
    if kernels.mlp == "auto":
        kernels = replace(kernels, mlp=_best_mlp(device, num_tokens, gradients))
    if kernels.mlp != "torch" and device.type != "cuda":
        LOGGER.info("mlp=%r needs CUDA; the feed-forward layers compute in plain torch", kernels.mlp)
        kernels = replace(kernels, mlp="torch")
    if kernels.attention != "auto":
        return kernels
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        for fewest, attention, width in (_BEST if gradients else _BEST_IN_DRAWING).get(major, ()):
            if not gradients and kernels.text == "packed" and attention in _PACKAGES:
                continue
            activate = partial(_activate, attention, width, device, gradients)
            if num_tokens >= fewest and _works("attention", attention, activate):
                return replace(kernels, attention=attention, head_width=width)
        LOGGER.info("attention='auto': nothing is measured for %s; torch chooses", torch.cuda.get_device_name(device))
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return replace(kernels, attention="products")
    return replace(kernels, attention="torch")


def _best_mlp(device: torch.device, num_tokens: int, gradients: bool) -> str:
    if device.type != "cuda":
        return "torch"
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    pays = is_hopper and (gradients or num_tokens >= _FEWEST_FOR_QUACK)
    if pays and _works("mlp", "quack", partial(_activate_quack, device)):
        return "quack"
    return "torch" if gradients else "cublas"


def is_installed(form: str) -> bool:
    """Whether the packages of an attention or feed-forward layer are there."""
    if form not in _PACKAGES:
        return True
    try:
        return importlib.util.find_spec(_PACKAGES[form][0]) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def _works(key: str, form: str, activate: Callable[[], None]) -> bool:
    """Activate a form that "auto" would take; whether a card computes it. Of a package that fails, says why."""
    if not is_installed(form):
        return False
    try:
        activate()
    except RuntimeError as error:
        LOGGER.warning("%s='auto': %s", key, error)
        return False
    return True


def _activate(attention: str, width: int | None, device: torch.device, gradients: bool) -> None:
    """FlashAttention 3 and 4 take the place of torch's FLASH kernel, in this process.

    They compute something known first: their versions do not all fit that of torch, nor each width of a head.
    """
    if attention not in _PACKAGES:
        return
    # Compiled when they are first called, for 10 s and more; kept on disk for the next process.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(kept_in("flash-attn-4-mended")))
    with _explained("attention", attention, "'cudnn'"):
        if attention == "fa4":
            mend()
        torch.nn.attention.activate_flash_attention_impl(attention.upper())  # type: ignore[arg-type]
        try:
            _check_flash(width or 72, device, gradients)
        except Exception:
            torch.nn.attention.restore_flash_attention_impl()
            raise
    LOGGER.info("attention: %s takes the place of torch's FLASH kernel", attention.upper())


def _activate_quack(device: torch.device) -> None:
    """Its kernels compute something known first."""
    with _explained("mlp", "quack", "'torch'"):
        # Not while the compiler reads a block.
        epilogues = importlib.import_module("diffusion.models.kernels.epilogues")
        with torch.inference_mode(False), torch.no_grad():
            generator = torch.Generator(device).manual_seed(0)
            rows, weight = torch.randn(2, 64, 64, generator=generator, device=device).bfloat16()
            exact = F.gelu(F.linear(rows.double(), weight.double(), rows[0].double()), approximate="tanh")
            error = ((epilogues.gelu_linear(rows, weight, rows[0]) - exact).norm() / exact.norm()).item()
        if not error < _LARGEST_ERROR:
            raise ArithmeticError(f"wrong GELU of a product, relative error {error:.2g}")


def _check_flash(width: int, device: torch.device, gradients: bool) -> None:
    """Attention by the FLASH kernel against exact attention.

    Args:
        width: channels of a head. gradients: look at them too.
    Raises:
        ArithmeticError: one of them is wrong.
    """

    def results(backend: SDPBackend, given: Tensor) -> list[Tensor]:
        q, k, v, grad = (part.detach().requires_grad_(gradients) for part in given)
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(q, k, v)
        return [output, *(torch.autograd.grad(output, (q, k, v), grad) if gradients else ())]

    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        generator = torch.Generator(device).manual_seed(0)
        given = torch.randn(4, 1, 2, 256, width, generator=generator, device=device).bfloat16()
        ours, exact = results(SDPBackend.FLASH_ATTENTION, given), results(SDPBackend.MATH, given.double())
    for name, found, right in zip(("outputs", "queries", "keys", "values"), ours, exact):
        error = ((found - right).norm() / right.norm()).item()
        if not error < _LARGEST_ERROR:
            what = name if name == "outputs" else f"gradients of {name}"
            raise ArithmeticError(f"wrong {what} at head width {width}, relative error {error:.2g}; 96 may be right")


@contextmanager
def _explained(key: str, form: str, other: str) -> Iterator[None]:
    """Errors of a package become one that names the key, the package and what to do."""
    package = _PACKAGES[form][1]
    if not is_installed(form):
        raise RuntimeError(f"{key}={form!r} needs the package {package}; install it, or use {other}")
    try:
        yield
    except Exception as error:  # whatever kernels that are compiled when they are needed can raise
        raise RuntimeError(
            f"{key}={form!r}: the package {package} is installed, but fails ({type(error).__name__}: "
            f"{first_line(error)}); install the versions of the extra `flash`, or use {other}"
        ) from error
