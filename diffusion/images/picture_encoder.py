"""A frozen picture encoder from a local folder, as a function from pixels to features of patches.

Legend: B pictures, H x W pixels, rows x cols patches, A width of the features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from diffusion.errors import CheckpointError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class PictureEncoder:
    """A vision transformer whose patch features are read after its last norm.

    Args:
        model: of timm or transformers. kind: which of them.
        patch_size: pixels a side. channels: A. mean, std: what the model's pictures are normalised by.
    """

    model: Any
    kind: str
    patch_size: int
    channels: int
    mean: tuple[float, ...] = _IMAGENET[0]
    std: tuple[float, ...] = _IMAGENET[1]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, rows * cols, A) float32; the picture is scaled so that a patch is a token."""
        rows, cols = grid
        size = (rows * self.patch_size, cols * self.patch_size)
        unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
        if unit.shape[-2:] != size:
            unit = F.interpolate(unit, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (unit.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        inputs = (unit - mean) / std
        if self.kind == "timm":
            tokens = self.model.forward_features(inputs)
        else:
            tokens = self.model(pixel_values=inputs, **self._any_size(size)).last_hidden_state
        tokens = tokens[:, -rows * cols :]  # class and register tokens come first
        if tokens.shape[1] != rows * cols:
            raise CheckpointError(f"the encoder gives {tokens.shape[1]} patches for a grid of {rows} x {cols}")
        return tokens.float()

    def _any_size(self, size: tuple[int, int]) -> dict[str, bool]:
        """ViT of transformers has to be asked for other sizes than its own; DINOv2 takes any."""
        own = getattr(self.model.config, "image_size", None)
        asks = self.model.config.model_type in ("vit", "vit_mae", "deit") and (own, own) != size
        return {"interpolate_pos_encoding": True} if asks else {}


def load_picture_encoder(folder: str | Path, device: str | torch.device = "cpu") -> PictureEncoder:
    """Open a local folder of transformers (DINOv2, ViT, ...) or of timm (config.json with `architecture`).

    Raises:
        CheckpointError: no such folder, or no vision transformer with patches.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no encoder folder (config.json: {error})") from error
    try:
        encoder = _timm(folder, config) if "architecture" in config else _transformers(folder)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder}: the encoder cannot be loaded ({reason})") from error
    encoder.model.to(device).eval().requires_grad_(False)
    return encoder


def _transformers(folder: Path) -> PictureEncoder:
    from transformers import AutoModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a pooler that the file lacks is never asked for
    try:
        model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    finally:
        logging.set_verbosity(verbosity)
    model = getattr(model, "vision_model", model)  # CLIP and SigLIP hold a text part too
    mean, std = _IMAGENET
    if (folder / "preprocessor_config.json").is_file():
        stated = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        mean, std = tuple(stated.get("image_mean", mean)), tuple(stated.get("image_std", std))
    return PictureEncoder(model, "transformers", model.config.patch_size, model.config.hidden_size, mean, std)


def _timm(folder: Path, config: dict[str, Any]) -> PictureEncoder:
    import timm

    options = {"dynamic_img_size": True, "num_classes": 0, **config.get("model_args", {})}
    model: Any = timm.create_model(config["architecture"], pretrained=False, **options)
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    unexpected = [key for key in unexpected if not key.startswith(("head.", "fc."))]  # the classifier is left out
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}")
    cfg = config.get("pretrained_cfg", {})
    mean, std = tuple(cfg.get("mean", _IMAGENET[0])), tuple(cfg.get("std", _IMAGENET[1]))
    return PictureEncoder(model, "timm", model.patch_embed.patch_size[0], model.num_features, mean, std)
