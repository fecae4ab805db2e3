"""A whole pipeline with tiny random networks, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from diffusion.adapters import adapter_parameters, read_adapter_from, start_lora, write_layout
from diffusion.checkpoints import save_transformer
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.inference.offload import HostWeights, WholeVisitor
from diffusion.models import PixArt
from tests.tiny import TINY_TEXT_CHANNELS, write_tiny_pipeline_parts

SIZE_PX = 64


def tiny_transformer(**overrides: object) -> PixArt:
    """2 blocks of width 48 for 64 px; its random weights make it answer to every input (a fresh model predicts 0)."""
    settings = {"hidden_size": 48, "num_heads": 4, "depth": 2, "input_size": SIZE_PX // 8, **overrides}
    model = PixArt(caption_channels=TINY_TEXT_CHANNELS, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.eval()


def write_tiny_pipeline(folder: Path, **overrides: object) -> Path:
    """A folder in the layout of diffusers; overrides: of the transformer's config."""
    write_tiny_pipeline_parts(folder)
    save_transformer(tiny_transformer(**overrides), folder / "transformer")
    make_scheduler("dpm-solver").save_pretrained(folder / "scheduler")
    return folder


def write_tiny_adapter(folder: Path, *, seed: int = 0, use_dora: bool = False, **overrides: object) -> Path:
    """The file of a LoRA of `tiny_transformer(**overrides)`, whose factors are not zero, in a folder."""
    network = tiny_transformer(**overrides)
    start_lora(network, 2, use_dora=use_dora)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(network).items():
        if "magnitude" in name:
            parameter.data *= 1.1
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return write_layout(read_adapter_from(network), folder, "diffusers")


class WholeVisitorInBlocks(WholeVisitor):
    """On any device as on a card: the weights lie in a block of the host, and a visit is a copy of it."""

    def __init__(self, module: nn.Module, device: torch.device, blocks: Sequence[nn.Module] = ()) -> None:
        super().__init__(module, device, blocks)
        if not self._weights:
            self._weights = [HostWeights(module, device)]


def load_quietly(folder: Path, **options: object) -> PixArtPipeline:
    pipeline = PixArtPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
