"""The weight file of the HED edge network, `ControlNetHED.pth`."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion.checkpoints.download import OUTPUT_DIR, target_of
from diffusion.checkpoints.hub import hub_file, parse_hub_id
from diffusion.checkpoints.published import find_published
from diffusion.checkpoints.tensors import read_tensors
from diffusion.checkpoints.weights import require_fit
from diffusion.errors import CheckpointError
from diffusion.models import HED

_NAME = "ControlNetHED.pth"


def load_hed(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> HED:
    """The HED edge network in eval mode, frozen; the weights exist once in memory.

    Args:
        path: `ControlNetHED.pth`, the same weights as safetensors, or a hub id `owner/name/file`.
    Raises:
        CheckpointError: not there (the message says what to put where), damaged, code in a pickle, or not HED.
    """
    hub_id = parse_hub_id(path)
    file = Path(path) if hub_id is None or hub_id[1] is None else hub_file(hub_id[0], hub_id[1])
    if not file.is_file():
        row = find_published(_NAME)
        raise CheckpointError(
            f"{path}: no such file; the HED edge network is {row.pattern} of {row.repo}: put it there, or let "
            f"`python tools/download.py --model_names {_NAME} --only_models` put it at "
            f"{target_of(row, row.pattern, OUTPUT_DIR)}"
        )
    tensors = read_tensors(file)
    with torch.device("meta"):
        network = HED()
    if not set(tensors) & set(network.state_dict()):
        raise CheckpointError(
            f"{path} holds no HED edge network, only {next(iter(tensors), 'nothing')}, ...; give {_NAME}"
        )
    require_fit(network, tensors, path)
    network.load_state_dict(tensors, assign=True)
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)
