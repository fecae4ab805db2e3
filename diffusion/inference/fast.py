"""One switch for fast drawing: what is compiled, recorded as a CUDA graph, and, if asked for, made lossy."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion.adapters import adapter_names
from diffusion.errors import PromptError
from diffusion.graphs import GraphCache, Work, addresses
from diffusion.inference.fp8 import has_fp8_products, quantize_network
from diffusion.inference.shortcuts import Shortcuts
from diffusion.models.kernels import Kernels, use_kernels
from diffusion.models.kernels.availability import kept_in

if TYPE_CHECKING:
    from diffusion.inference.memory import MemoryPlan
    from diffusion.models import ControlPixArt, PixArt

_logger = logging.getLogger(__name__)

CAPTION_LENGTHS = (32, 64, 120, 300)  # captions are padded to the next of these: each length has a graph of its own
CARD_KERNELS = Kernels(attention="auto", text="direct", fused=True, mlp="auto")  # in half precision on CUDA
MAX_GRAPHS = 8  # solver loops kept, by size, batch, caption length, steps and solver


@dataclass(frozen=True)
class FastSettings:
    """What `enable_fast_sampling` was asked for; see there."""

    graph: bool = True
    compile: bool | None = None
    autotune: bool = False
    vae_bfloat16: bool = False
    fp8: bool = False
    kernels: Kernels | None = None
    shortcuts: Shortcuts = field(default_factory=Shortcuts)

    def changes(self) -> dict[str, Any]:
        """What changes the picture beyond rounding of the network, for its recipe."""
        flags = {name: True for name in ("vae_bfloat16", "fp8") if getattr(self, name)}
        return flags | {name: value for name, value in asdict(self.shortcuts).items() if value != 1}


class FastPath:
    """Graphs and compiled kernels of one pipeline, and what was already said about them."""

    def __init__(self, settings: FastSettings) -> None:
        self.settings = settings
        self.solver_graphs = GraphCache(MAX_GRAPHS)
        self.decoder_graphs = GraphCache(MAX_GRAPHS)  # apart: pictures are decoded beside the next solver loop
        self.text_graphs = GraphCache(MAX_GRAPHS)
        self._negatives: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._text_weights: Hashable = None  # addresses of T5's, where this call has asked for them
        self._said: set[str] = set()
        self._ready_for: torch.device | None = None
        self._decoder_layout = torch.contiguous_format

    def prepare(self, network: PixArt | ControlPixArt, vae: Any, device: torch.device, *, movable: bool) -> None:
        """Before the first step on a device: have blocks and the VAE's decoder compiled when they first run.

        Args:
            movable: no memory plan holds the weights, so they may be laid out anew.
        """
        if self._ready_for == device:
            return
        self._ready_for, settings = device, self.settings
        on_card = device.type == "cuda" and network.dtype in (torch.bfloat16, torch.float16)
        use_kernels(network, settings.kernels or (CARD_KERNELS if on_card else Kernels()), gradients=False)
        if settings.graph and device.type != "cuda":
            self.say(f"fast sampling: CUDA graphs need a card of NVIDIA; on {device.type} the loop runs step by step")
        if settings.fp8 and not has_fp8_products(device):
            self.say(f"fast sampling: no FP8 products on {device}; they are emulated, which is slower than without")
        if not (device.type == "cuda" if settings.compile is None else settings.compile):
            return
        if missing := _missing_compiler(device):
            self.say(f"fast sampling: nothing is compiled, {missing}")
            return
        kernel_cache()
        mode = "max-autotune-no-cudagraphs" if settings.autotune else None
        network.compile_blocks(dynamic=False, fullgraph=True, mode=mode)
        if device.type == "cuda" and self.can_decode(vae):
            vae.decoder.compile(dynamic=False, mode=mode)
            if movable:
                nn.Module.to(vae, memory_format=torch.channels_last)
            self._decoder_layout = torch.channels_last  # faster if compiled, slower if not

    def solve(
        self,
        key: Hashable,
        work: Work,
        loop: Work,
        tensors: dict[str, Tensor],
        network: nn.Module,
        obstacle: str | None,
    ) -> Tensor:
        """Latents of the solver: by `work` as one graph, or where there is an obstacle or no card by `loop`."""
        if not self.settings.graph or tensors["noise"].device.type != "cuda":
            return loop(tensors)
        if obstacle is not None:
            self.say(f"fast sampling: {obstacle}, so the loop runs step by step")
            return loop(tensors)
        return self.solver_graphs.run(key, work, tensors, weights=addresses(network))

    def text_options(self, text_encoder: nn.Module, device: torch.device, plan: MemoryPlan | None) -> dict[str, Any]:
        """Options of `CaptionEncoder` with which T5 runs as a graph: its own launches take longer than its products."""
        if not self.settings.graph or device.type != "cuda" or (plan is not None and plan.text_encoder == "streamed"):
            return {}
        self._text_weights = addresses(text_encoder)
        run = partial(self.text_graphs.run, "text", weights=self._text_weights)
        return {"padded_length": padded_length, "run": run, "fused": not hasattr(text_encoder, "_hf_hook")}

    def negatives(
        self, key: Hashable, text_encoder: nn.Module, encode: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of negative prompts, which are the same for picture after picture: encoded once.

        Args:
            key: all that decides them, beside T5's weights, which may be replaced, but not written over.
            encode: makes them. The prompts of this call have been encoded already, if they had to be.
        """
        weights, self._text_weights = self._text_weights or addresses(text_encoder), None
        full_key = (key, weights)
        if full_key not in self._negatives:
            if len(self._negatives) >= MAX_GRAPHS:
                self._negatives.clear()
            self._negatives[full_key], self._text_weights = encode(), None
        return self._negatives[full_key]

    def can_decode(self, vae: Any) -> bool:
        """Whether `decode` has something to offer: a decoder that draws no noise."""
        return isinstance(getattr(vae, "decoder", None), nn.Module)

    def decode(self, vae: Any, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """What `decode`, the same for a size until the graphs are forgotten, makes of latents; as one graph where there
        is a card."""
        tensors = {"latents": latents.contiguous(memory_format=self._decoder_layout)}

        def work(given: Mapping[str, Tensor]) -> Tensor:
            return decode(given["latents"])

        if not self.settings.graph or latents.device.type != "cuda":
            return work(tensors)
        return self.decoder_graphs.run(getattr(vae, "use_tiling", False), work, tensors, weights=addresses(vae))

    def forget_graphs(self) -> None:
        """Of what draws and decodes, which several processes may do together."""
        self.solver_graphs.clear()
        self.decoder_graphs.clear()

    def say(self, text: str) -> None:
        """Log it, once a pipeline."""
        if text not in self._said:
            self._said.add(text)
            _logger.info(text)


class FastSampling:
    """Mixed into the pipeline: the switch."""

    transformer: Any
    controlnet: Any
    vae: Any
    memory_plan: Any
    _fast: FastPath | None = None

    def enable_fast_sampling(
        self,
        *,
        graph: bool = True,
        compile: bool | None = None,
        autotune: bool = False,
        kernels: Kernels | None = None,
        vae_bfloat16: bool = False,
        fp8: bool = False,
        guidance_until: float = 1.0,
        reuse_every: int = 1,
    ) -> None:
        """Draw faster from now on. What a machine cannot do is left out, and said once.

        Without the last four arguments pictures differ from those of the plain path by rounding alone; graphs do not
        change a bit. To be called after adapters are fused, and before a memory plan is set if vae_bfloat16 or fp8 are
        asked for.

        Args:
            graph: on CUDA, record the whole solver loop as one graph when a size, batch, number of steps and solver is
                seen for the second time.
            compile: have blocks and the VAE's decoder compiled; kernels are kept on disk for the next process. None =
                on CUDA alone, as it takes long on a CPU.
            autotune: try more kernels while compiling; takes minutes once.
            kernels: attention, text and fused operations of the blocks; None = on CUDA in half precision the best
                exact attention of the card, and captions without padding.
            vae_bfloat16: decode in bfloat16.
            fp8: lossy: large linear layers in 8-bit floating point. Cannot be undone; load the pipeline again.
            guidance_until: lossy: share of the steps, from the first, that are guided.
            reuse_every: lossy: run all blocks in every n-th step only; not with a ControlNet.
        Raises:
            PromptError: a value outside its range, adapters that are not fused, or too late for it.
        """
        settings = FastSettings(
            graph, compile, autotune, vae_bfloat16, fp8, kernels, Shortcuts(guidance_until, reuse_every)
        )
        if (fp8 or vae_bfloat16) and self.memory_plan is not None:
            raise PromptError("fp8 and vae_bfloat16 change weights: enable_fast_sampling before the memory plan is set")
        if fp8 and adapter_names(self.transformer):
            raise PromptError("fp8 with loaded adapters: fuse_lora() and unload_lora_weights() first")
        if reuse_every > 1 and self.controlnet is not None:
            raise PromptError(
                "reuse_every leaves no place for a ControlNet; load the pipeline without, or leave it out"
            )
        self.disable_fast_sampling()
        if fp8:
            quantize_network(self.transformer if self.controlnet is None else self.controlnet)
        if vae_bfloat16:
            nn.Module.to(
                self.vae, torch.bfloat16
            )  # diffusers' own warns of parts to keep in float32, of which it has none
        self._fast = FastPath(settings)

    def disable_fast_sampling(self) -> None:
        """Draw plainly again; what was cast or put into FP8 stays so."""
        self._fast, network = None, self.controlnet or self.transformer
        use_kernels(network, Kernels())
        modules = [*network.blocks, getattr(self.vae, "decoder", None)]
        for module in modules:
            if isinstance(module, nn.Module):
                module._compiled_call_impl = None

    @property
    def fast_settings(self) -> FastSettings | None:
        """What fast sampling was asked for; None = it is off."""
        return None if self._fast is None else self._fast.settings


def padded_length(tokens: int) -> int:
    """The caption length that a graph is made for."""
    return next((length for length in CAPTION_LENGTHS if length >= tokens), tokens)


def kernel_cache() -> Path:
    """Folder that keeps compiled kernels for later processes: TORCHINDUCTOR_CACHE_DIR, or ~/.cache/pixart/kernels.

    torch's own default, which torch writes into the variable when it is loaded, lies in /tmp: a restart of the machine
    or container empties it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given not in (None, default_cache_dir()):
        return Path(given)
    folder = kept_in("kernels")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on a device, as the end of a sentence."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"
