"""HED, holistically-nested edge detection (arXiv:1504.06375), as the ControlNets of PixArt-delta were trained with it.

Legend: B pictures, H x W their size in px. State-dict keys and shapes are those of `ControlNetHED.pth`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Input and output channels of the five blocks, and their convolutions: those of VGG-16.
_BLOCKS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))


class HEDBlock(nn.Module):
    """Convolutions at one scale, and a side output."""

    def __init__(self, in_channels: int, out_channels: int, num_convs: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_convs
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, padding=1) for before, after in pairwise(widths)
        )
        self.projection = nn.Conv2d(out_channels, 1, kernel_size=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C_in, h, w) -> features (B, C_out, h, w) and side output (B, 1, h, w)."""
        for conv in self.convs:
            features = F.relu(conv(features), inplace=True)
        return features, self.projection(features)


class HED(nn.Module):
    """Five scales of VGG-16; each next one sees half the size of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # mean colour of the training pictures
        for number, shape in enumerate(_BLOCKS, start=1):
            self.add_module(f"block{number}", HEDBlock(*shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def forward(self, levels: Tensor) -> Tensor:
        """Edge probabilities: the side outputs at the size of the picture, averaged, through a sigmoid.

        Args:
            levels: (B, 3, H, W), RGB in 0..255.
        Returns:
            (B, 1, H, W) in 0..1.
        Raises:
            ValueError: pictures below 16 px, which four halvings leave nothing of.
        """
        size = levels.shape[-2:]
        if min(size) < 2 ** (len(_BLOCKS) - 1):
            raise ValueError(f"pictures of {size[0]}x{size[1]} px are too small for HED; give 16 px or more")
        features = levels - self.norm
        total = levels.new_zeros(())
        for number in range(1, len(_BLOCKS) + 1):
            if number > 1:
                features = F.max_pool2d(features, kernel_size=2)
            features, side = self.get_submodule(f"block{number}")(features)
            total = total + F.interpolate(side, size=size, mode="bilinear", align_corners=False)
        return torch.sigmoid(total / len(_BLOCKS))
