"""HED against the formulas of its paper, at full size: there is no smaller one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import resize

from diffusion.models import HED

CONVS = {1: (3, 64, 2), 2: (64, 128, 2), 3: (128, 256, 3), 4: (256, 512, 3), 5: (512, 512, 3)}


def random_hed() -> HED:
    """Weights that keep the size of the features, so that edges depend on the picture."""
    with torch.device("meta"):
        network = HED()
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            gain = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain)
        network.norm.fill_(120.0)
    return network.eval().requires_grad_(False)


def by_hand(state: dict[str, Tensor], levels: Tensor) -> Tensor:
    """Side outputs scaled to the picture by torchvision, stacked, averaged, through the logistic function."""
    features, sides = levels - state["norm"], []
    for number, (_, _, count) in CONVS.items():
        if number > 1:
            features = F.max_pool2d(features, (2, 2), stride=(2, 2))
        for index in range(count):
            key = f"block{number}.convs.{index}"
            features = F.conv2d(features, state[f"{key}.weight"], state[f"{key}.bias"], padding=1).clamp(min=0)
        key = f"block{number}.projection"
        sides.append(resize(F.conv2d(features, state[f"{key}.weight"], state[f"{key}.bias"]), list(levels.shape[-2:])))
    return 1 / (1 + torch.exp(-torch.stack(sides, dim=1).mean(dim=1)))


def test_edges_are_the_mean_of_five_scales() -> None:
    network = random_hed()
    levels = (
        torch.rand(2, 3, 36, 50, generator=torch.Generator().manual_seed(1)) * 255
    )  # sides that do not halve evenly
    edges = network(levels)
    assert edges.shape == (2, 1, 36, 50)
    assert edges.std() > 0.05 and edges.min() >= 0 and edges.max() <= 1
    torch.testing.assert_close(edges, by_hand(network.state_dict(), levels), atol=1e-4, rtol=1e-4)


def test_keys_and_parameters_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        network = HED()
    shapes: dict[str, tuple[int, ...]] = {"norm": (1, 3, 1, 1)}
    for number, (before, after, count) in CONVS.items():
        for index in range(count):
            shapes[f"block{number}.convs.{index}.weight"] = (after, after if index else before, 3, 3)
            shapes[f"block{number}.convs.{index}.bias"] = (after,)
        shapes[f"block{number}.projection.weight"] = (1, after, 1, 1)
        shapes[f"block{number}.projection.bias"] = (1,)
    assert {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in network.parameters()) == 14_716_168


def test_pictures_that_are_too_small_are_refused() -> None:
    with torch.device("meta"):
        network, levels = HED(), torch.zeros(1, 3, 64, 15)
    with pytest.raises(ValueError, match="64x15 px are too small for HED; give 16 px or more"):
        network(levels)
