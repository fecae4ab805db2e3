"""ControlNet in the pipeline: its network beside the base, and condition pictures as latents.

Legend: B pictures, C latent channels, H x W their size in px, h x w latent size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoints import load_controlnet, load_hed, open_checkpoint
from diffusion.checkpoints.files import locate
from diffusion.errors import CheckpointError
from diffusion.images import detect_edges
from diffusion.inference.editing import picture_pixels, pictures_for
from diffusion.models import HED, ControlPixArt, PixArt


def load_networks(
    transformer: str | Path | PixArt | ControlPixArt,
    controlnet: str | Path | None,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    ema: bool = False,
    variant: str | None = None,
    image_size: int | None = None,
) -> tuple[PixArt, ControlPixArt | None]:
    """The network that draws and, where there is one, the ControlNet around it.

    Args:
        transformer: a checkpoint of any kind, or a network; a ControlNet (file) brings its own base.
        controlnet: a ControlNet file for `transformer`, whose weights take the place of the base in the file; or a
            `checkpoint-N` of its training.
        ema, variant, image_size: of `transformer`; see `open_checkpoint` (image_size: `untold_image_size`).
    Raises:
        CheckpointError: see `open_checkpoint`; `controlnet` is made for another kind of model; or both are ControlNets.
    """
    controlnet = None if controlnet is None else locate(controlnet)  # before the other weights are read
    if isinstance(transformer, (PixArt, ControlPixArt)):
        network = transformer.to(device=device, dtype=dtype).eval()
    else:
        checkpoint = open_checkpoint(transformer, ema=ema, variant=variant, untold_image_size=image_size)
        network = checkpoint.build_control(device, dtype) if checkpoint.control else checkpoint.build(device, dtype)
    if isinstance(network, ControlPixArt):
        if controlnet is not None:
            raise CheckpointError(f"{controlnet}: the model is a ControlNet already; leave one of the two out")
        return network.base_model, network
    return network, None if controlnet is None else load_controlnet(controlnet, network, ema=ema)


def load_edge_detector(source: str | Path | HED | None, device: str | torch.device) -> HED | None:
    """HED in float32 from its weight file; see `load_hed` for what is raised."""
    return load_hed(source, device=device) if isinstance(source, (str, Path)) else source


def condition_pixels(
    image: Any, detector: HED | None, *, count: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Condition pictures scaled to cover `size` (height, width) and cut, (1 or B, 3, H, W) in [-1, 1].

    Args:
        image: one picture, or one for each of `count`; PIL, or a tensor (3, H, W) in [-1, 1].
        detector: finds the edges of the pictures, at the size that is drawn; None = the pictures are edges.
    Raises:
        PromptError: another number of pictures, something that is no picture, or a tensor of another size.
    """
    pictures = pictures_for(image, count, "control_image")
    pixels = torch.stack([picture_pixels(picture, size, "control_image") for picture in pictures]).to(device)
    return pixels if detector is None else detect_edges(detector, pixels)
