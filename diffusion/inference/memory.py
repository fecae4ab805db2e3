"""Memory plans: which parts of a pipeline are on the device when, and what that takes at most.

Legend: P captions encoded at a time, L text tokens, N image tokens, D width of the network.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion.errors import PromptError, did_you_mean
from diffusion.images import vae_factor
from diffusion.inference.offload import StreamingVisitor, WholeVisitor
from diffusion.text.int8 import Int8Linear, quantize_linears

_logger = logging.getLogger(__name__)

ENCODE_BATCH = 32  # captions that T5 encodes at a time
CUDA_CONTEXT_BYTES = 800_000_000  # driver, kernels and handles of a process, outside torch's count; 0.73 to 0.83 seen


@dataclass(frozen=True)
class MemoryPlan:
    """What one choice of `--memory` means.

    Args:
        text_encoder: "whole"; "int8", whole with its linear layers in 8 bits; "streamed", block by block.
        together: parts that share the device; all others leave before one of them comes.
        tile_px: the VAE decodes tiles of this side; None = whole pictures.
    """

    name: str
    text_encoder: str
    together: frozenset[str]
    tile_px: int | None

    def __str__(self) -> str:
        encoder = {"whole": "T5 whole", "int8": "T5 in int8", "streamed": "T5 streamed block by block"}
        tiles = "" if self.tile_px is None else f", VAE in tiles of {self.tile_px} px"
        return f"{self.name} ({encoder[self.text_encoder]}{tiles})"


PLANS = {
    "full": MemoryPlan("full", "whole", frozenset({"transformer", "vae", "edge_detector"}), None),
    "8gb": MemoryPlan("8gb", "int8", frozenset(), None),
    # On the bundled VAE a mosaic of 1024 px in tiles of 512 px is 38 dB from the whole, in tiles of 768 px 40 dB.
    "4gb": MemoryPlan("4gb", "streamed", frozenset(), 768),
}
MEMORY_CHOICES = ("auto", *PLANS)


@dataclass(frozen=True)
class Workload:
    """What is to be drawn: sizes in px, pictures at a time, passes of the network at a time (2 with guidance)."""

    height: int
    width: int
    pictures: int = 1
    guided: bool = True
    num_captions: int = 1


def expected_peak(plan: MemoryPlan, parts: Any, work: Workload, *, tokens: int, device: torch.device) -> dict[str, int]:
    """Bytes of device memory at the peak of each stage: "text", "network", "decoding"; with an edge detector "edges".

    Weights are counted; activations follow the sizes, with factors counted on XL/2, T5-XXL and the VAE of SD.

    Args:
        parts: has text_encoder (or None), transformer and vae; may have controlnet and edge_detector.
        tokens: most tokens a caption has.
    """
    context = CUDA_CONTEXT_BYTES if device.type == "cuda" else 0
    network, vae = parts.transformer, parts.vae
    controlnet, detector = getattr(parts, "controlnet", None), getattr(parts, "edge_detector", None)
    network_bytes, vae_bytes = _num_bytes(network if controlnet is None else controlnet), _num_bytes(vae)
    text = _text_peak(plan, parts.text_encoder, tokens, min(work.num_captions, ENCODE_BATCH))
    channels = vae.config.block_out_channels
    pixels_per_latent = vae_factor(vae.config) ** 2
    rows = work.pictures * (2 if work.guided else 1)
    image_tokens = work.height * work.width // pixels_per_latent // network.config.patch_size**2
    # Tokens, their norm, q, k, v, the hidden layer of the MLP twice: 12.3 x (rows, N, D) were counted; two more while
    # a control block computes and the base's tokens wait.
    factor = 12.3 if controlnet is None else 14.3
    activations = int(factor * rows * image_tokens * network.config.hidden_size) * network.dtype.itemsize
    pixels = work.height * work.width
    picture = pixels * 3 * 4 * work.pictures
    if plan.tile_px is not None:
        pixels = min(pixels, plan.tile_px**2)
    widest = max(2 * channels[0], channels[min(1, len(channels) - 1)])
    # Three states of full size and what cuDNN's convolutions need to work in; where there is room they take one more.
    decoding = int(4.1 * pixels * widest) * vae.dtype.itemsize + picture
    weights = {"transformer": network_bytes, "vae": vae_bytes}
    if detector is not None:
        weights["edge_detector"] = _num_bytes(detector)

    def present(name: str) -> int:
        """Weights on the device while a part computes."""
        return sum(size for other, size in weights.items() if other == name or {name, other} <= plan.together)

    peaks = {
        "text": context + text,
        "network": context + present("transformer") + activations,
        "decoding": context + present("vae") + decoding,
    }
    if detector is not None:
        # A picture at a time: three states of its full size with 64 channels; 3.06 were counted.
        states = int(3.1 * work.height * work.width * 64) * detector.dtype.itemsize
        peaks["edges"] = context + present("edge_detector") + states
    return peaks


def choose_plan(name: str, peak: Callable[[MemoryPlan], int], device: torch.device) -> MemoryPlan:
    """A plan by name; "auto": the first of full, 8gb, 4gb whose expected peak is free on the device. Says which.

    Args:
        peak: expected bytes of a plan.
    Raises:
        PromptError: unknown name.
    """
    check_plan_name(name)
    free = free_memory(device)
    if name != "auto":
        plan = PLANS[name]
        reason = ""
    elif free is None:
        plan, reason = PLANS["full"], f", chosen because memory on {device.type} is not counted"
    else:
        fitting = [plan for plan in PLANS.values() if peak(plan) <= free]
        plan = fitting[0] if fitting else PLANS["4gb"]
        reason = ", chosen for it" if fitting else ", the smallest there is; it may not be enough"
    available = "" if free is None else f" of {_in_gb(free)} free on {device}"
    _logger.info("memory plan %s: expected peak %s%s%s", plan, _in_gb(peak(plan)), available, reason)
    return plan


def check_plan_name(name: str) -> None:
    """Raises PromptError for a name that `choose_plan` does not know."""
    if name not in MEMORY_CHOICES:
        raise PromptError(f"memory={name!r} is unknown; {did_you_mean(name, MEMORY_CHOICES)}")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a CUDA device has free, what this process has taken for its context counted as free.

    None for devices that do not count theirs apart from the host's.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + CUDA_CONTEXT_BYTES)


class Residency:
    """Brings the parts of a pipeline to the device when they are needed, and sends others away before."""

    def __init__(self, plan: MemoryPlan, device: torch.device, parts: dict[str, Any]) -> None:
        """`parts`: text_encoder, transformer, vae and others, on the CPU; those that are None stay away."""
        self.plan, self.device = plan, device
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._visitors: dict[str, WholeVisitor | StreamingVisitor] = {}
        self._present: set[str] = set()
        for name, part in self._parts.items():
            self._visitors[name] = self._visitor(name, part)

    def bring(self, name: str) -> None:
        """Have a part on the device; those that the plan does not keep beside it leave first."""
        if name in self._present or name not in self._visitors:
            return
        stay = self.plan.together if name in self.plan.together else frozenset()
        self.release(self._present - stay)
        self._visitors[name].enter()
        self._present.add(name)

    def release(self, names: set[str] | None = None) -> None:
        """Send parts away from the device; None = all."""
        leaving = set(self._present if names is None else names)
        for name in leaving:
            self._visitors[name].leave()
        self._present -= leaving
        if leaving and self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of T5's size are of no use to the rest

    def forget(self, name: str) -> None:
        """Release a part and keep no memory of it."""
        self.release({name} & self._present)
        self._visitors.pop(name, None)
        self._parts.pop(name, None)
        gc.collect()  # a streamed part and its visitor refer to each other

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Within this context layers and weights of a part may change; after it, and after an error in it, the plan
        holds the part as it then is.

        The part is away from the device meanwhile. Not for the text encoder, whose blocks carry hooks of their visitor.
        """
        assert name != "text_encoder", "the text encoder's blocks carry hooks of their visitor"
        self.release({name} & self._present)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # no copy may still read the host's block, which is given up
        self._visitors.pop(name, None)
        try:
            yield
        finally:
            self._visitors[name] = self._visitor(name, self._parts[name])

    def _visitor(self, name: str, part: Any) -> WholeVisitor | StreamingVisitor:
        if name != "text_encoder":
            return WholeVisitor(part, self.device)
        blocks = list(part.encoder.block)
        if self.plan.text_encoder == "streamed":
            return StreamingVisitor(part, blocks, self.device)
        if self.plan.text_encoder == "int8":
            quantize_linears(part, self.device)
        return WholeVisitor(part, self.device, blocks)


def tile_vae(vae: Any, plan: MemoryPlan) -> None:
    """Let the VAE work as the plan says, a picture at a time, in tiles or whole; a VAE without tiles stays as it is."""
    if not hasattr(vae, "enable_tiling"):
        return
    vae.enable_slicing()
    if plan.tile_px is None:
        vae.disable_tiling()
        return
    vae.enable_tiling()
    vae.tile_sample_min_size = plan.tile_px
    vae.tile_latent_min_size = plan.tile_px // vae_factor(vae.config)


def _text_peak(plan: MemoryPlan, encoder: Any, tokens: int, captions: int) -> int:
    if encoder is None:
        return 0
    weights = _num_bytes(encoder)
    linears = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    if plan.text_encoder == "int8":
        weights -= sum(linear.weight.numel() * (linear.weight.dtype.itemsize - 1) for linear in linears)
        # A weight is restored for its product.
        widest = [module.weight.numel() for module in encoder.modules() if isinstance(module, (nn.Linear, Int8Linear))]
        weights += 4 * max(widest)
    if plan.text_encoder == "streamed":
        blocks = [_num_bytes(block) for block in encoder.encoder.block]
        weights += 2 * max(blocks) - sum(blocks)
    config: Any = encoder.config
    heads = 6 * captions * config.num_heads * tokens**2  # scores, and their softmax in float32
    return weights + heads + 5 * captions * tokens * config.d_ff * 2


def _num_bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensors.values())


def _in_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
