"""LPIPS, a perceptual distance (arXiv:1801.03924, Sec. 3), on the features of VGG-16.

State-dict keys and shapes are those of `lpips.LPIPS(net="vgg")`. Legend: B pictures, H x W their size in px.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))  # layers of VGG-16 up to each compared ReLU
_WIDTHS = (64, 128, 256, 512, 512)


class _Slices(nn.Module):
    def __init__(self) -> None:
        from torchvision.models import vgg16  # slow to import, and only distillation of a generator needs it

        super().__init__()
        layers = vgg16(weights=None).features
        for number, (first, last) in enumerate(_SLICES, start=1):
            part = nn.Sequential()
            for index in range(first, last):
                part.add_module(str(index), layers[index])
            self.add_module(f"slice{number}", part)


class _Scaling(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))


class _Linear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))


class LPIPS(nn.Module):
    """Weighted squared differences of unit-length features at five depths, averaged over space and added."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer, self.net = _Scaling(), _Slices()
        for number, width in enumerate(_WIDTHS):
            self.add_module(f"lin{number}", _Linear(width))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] -> (B,); H and W of 32 or more."""
        scaling = self.scaling_layer
        features = [(pixels - scaling.shift) / scaling.scale for pixels in (first, second)]
        total = first.new_zeros(len(first))
        for number in range(len(_SLICES)):
            features = [self.net.get_submodule(f"slice{number + 1}")(values) for values in features]
            unit = [values / (values.square().sum(1, keepdim=True).sqrt() + 1e-10) for values in features]
            weights = self.get_submodule(f"lin{number}.model.1")
            total = total + weights((unit[0] - unit[1]).square()).mean((1, 2, 3))
        return total
