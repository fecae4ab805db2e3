"""One sample, one batch: what data sets return and what objectives read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusion.data.shared_memory import discard
from diffusion.errors import DataError


@dataclass
class TrainSample:
    """Features of one sample.

    Args:
        latents_mean, latents_std: (C, h, w), unscaled.
        caption_embeds: (L, caption_channels), without padding.
        img_hw: height and width of the picture in px (what the size condition embeds).
        aspect_ratio: height / width (what the ratio condition embeds).
        number: the sample's number in the run.
        key: name for logs.
        class_id: for class-conditional networks. alignment: (N, A) features of a picture encoder, a vector a token.
        control_mean, control_std: likewise, of the condition that a ControlNet follows; None where there is none.
    """

    latents_mean: Tensor
    latents_std: Tensor
    caption_embeds: Tensor
    img_hw: tuple[float, float]
    aspect_ratio: float
    number: int
    key: str
    class_id: int | None = None
    alignment: Tensor | None = None
    control_mean: Tensor | None = None
    control_std: Tensor | None = None


@dataclass
class TrainBatch:
    """B samples of one bucket; captions keep the dtype they are stored in.

    latents_mean, latents_std (B, C, h, w) float32; caption_embeds (B, L, caption_channels), L the longest;
    caption_mask (B, L) bool, True = keep; img_hw (B, 2) float32; aspect_ratio (B,) float32; sample_numbers (B,) int64;
    class_ids (B,) int64 and alignment (B, N, A), where the data set has them. first_number: the lowest sample number.
    control_mean, control_std (B, C, h, w) float32 of conditions, or None.
    """

    latents_mean: Tensor
    latents_std: Tensor
    caption_embeds: Tensor
    caption_mask: Tensor
    img_hw: Tensor
    aspect_ratio: Tensor
    sample_numbers: Tensor
    keys: list[str]
    class_ids: Tensor | None = None
    alignment: Tensor | None = None
    first_number: int = 0
    control_mean: Tensor | None = None
    control_std: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by the names of their fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TrainBatch:
        """The batch on a device; from pinned memory the copy is asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TrainBatch:
        """The batch in page-locked memory. Called by the loader, whose worker's batch this is: it is used up by it."""

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory()
            discard(tensor)
            return pinned

        return self._map(moved)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


def collate(samples: Sequence[TrainSample]) -> TrainBatch:
    """Stack samples of one bucket; captions are padded to the longest.

    Raises:
        DataError: latents of different sizes, or conditions of other sizes than their pictures.
    """
    shapes = {tuple(sample.latents_mean.shape) for sample in samples}
    if len(shapes) != 1:
        named = ", ".join(f"{sample.key} {tuple(sample.latents_mean.shape)}" for sample in samples[:8])
        raise DataError(f"a batch mixes latents of different sizes: {named}; set multi_scale=True or extract again")
    conditions = [(sample.control_mean, sample.control_std) for sample in samples if sample.control_mean is not None]
    for sample in samples:
        if sample.control_mean is not None and sample.control_mean.shape != sample.latents_mean.shape:
            raise DataError(
                f"{sample.key}: the condition has latents of {tuple(sample.control_mean.shape)}, its picture of "
                f"{tuple(sample.latents_mean.shape)}; extract both at one size"
            )
    stacked = [torch.stack(values).float() for values in zip(*conditions)]  # type: ignore[arg-type]
    lengths = torch.tensor([len(sample.caption_embeds) for sample in samples])
    embeds = pad_sequence([sample.caption_embeds for sample in samples], batch_first=True)
    return TrainBatch(
        latents_mean=torch.stack([sample.latents_mean for sample in samples]).float(),
        latents_std=torch.stack([sample.latents_std for sample in samples]).float(),
        caption_embeds=embeds,
        caption_mask=torch.arange(embeds.shape[1]) < lengths[:, None],
        img_hw=torch.tensor([sample.img_hw for sample in samples], dtype=torch.float32),
        aspect_ratio=torch.tensor([sample.aspect_ratio for sample in samples], dtype=torch.float32),
        sample_numbers=torch.tensor([sample.number for sample in samples]),
        keys=[sample.key for sample in samples],
        class_ids=_stacked([None if sample.class_id is None else torch.tensor(sample.class_id) for sample in samples]),
        alignment=_stacked([sample.alignment for sample in samples]),
        first_number=min(sample.number for sample in samples),
        control_mean=stacked[0] if stacked else None,
        control_std=stacked[1] if stacked else None,
    )


def _stacked(values: list[Tensor | None]) -> Tensor | None:
    """None where a data set gives nothing; it gives all of its samples the same."""
    return None if values[0] is None else torch.stack([value for value in values if value is not None])
