"""A PixArt folder from a class-conditional DiT, with the proof that both predict the same at one timestep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion.checkpoints import load_dit, new_folder, save_transformer
from diffusion.errors import CheckpointError, ConfigError
from diffusion.models import DiT, PixArt, start_from_dit
from diffusion.models.reparameterization import PAPER_TIMESTEP

_LARGEST_DIFFERENCE = 1e-3  # of predictions of about unit size, in float32 through 28 blocks


@dataclass(frozen=True)
class MadeFromDit:
    """What was made: parameters, timestep, class (the null class has the number num_classes), and the proof."""

    parameters: int
    timestep: float
    class_id: int
    difference: float
    size: float

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.parameters:,} parameters; at t = {self.timestep:g} and class {self.class_id} it differs from the "
            f"DiT by at most {self.difference:.1e} (largest prediction {self.size:.2g})"
        )


def make_pixart(
    source: str | Path,
    output: str | Path,
    *,
    timestep: float = PAPER_TIMESTEP,
    class_id: int | None = None,
    image_size: int | None = None,
    caption_channels: int = 4096,
    max_length: int = 120,
    num_heads: int | None = None,
    ema: bool = False,
    seed: int = 0,
) -> MadeFromDit:
    """Write `output/transformer`; see `tools/init_from_dit.py`.

    Raises:
        CheckpointError: no DiT there, `output` exists, or the two networks do not agree.
        ConfigError: a timestep or class that does not exist.
    """
    dit = load_dit(source, ema=ema, num_heads=num_heads)
    config = dit.config
    torch.manual_seed(seed)
    model = PixArt(
        input_size=config.input_size if image_size is None else image_size // 8,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        pred_sigma=config.pred_sigma,
        prediction_type=config.prediction_type,
        caption_channels=caption_channels,
        model_max_length=max_length,
    ).eval()
    try:
        start_from_dit(model, dit, timestep=timestep, class_id=class_id)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    class_id = dit.null_class if class_id is None else class_id
    difference, size = compare(model, dit, timestep, class_id)
    if difference > _LARGEST_DIFFERENCE * max(size, 1.0):
        raise CheckpointError(f"{source}: the PixArt differs from the DiT by {difference:.2g} at t = {timestep:g}")
    with new_folder(output) as folder:
        save_transformer(model, folder / "transformer", stored_null_caption=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return MadeFromDit(parameters, timestep, class_id, difference, size)


@torch.no_grad()
def compare(model: PixArt, dit: DiT, timestep: float, class_id: int) -> tuple[float, float]:
    """Largest difference of two predictions from one noise, and the largest prediction."""
    generator = torch.Generator().manual_seed(0)
    side = dit.config.input_size
    latents = torch.randn(1, dit.config.in_channels, side, side, generator=generator)
    captions = torch.randn(1, 3, model.config.caption_channels, generator=generator)
    times = torch.full((1,), float(timestep))
    expected = dit(latents, times, torch.full((1,), class_id))
    found = model(latents, times, captions)
    return (found - expected).abs().max().item(), expected.abs().max().item()
