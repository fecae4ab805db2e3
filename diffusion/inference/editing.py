"""Pictures to begin from: image to image, and inpainting. Legend: B pictures, C latent channels, h x w latent size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusion.errors import PromptError
from diffusion.images import encode_moments, resize_and_crop, to_tensor
from diffusion.inference.denoising import noised


@dataclass(frozen=True)
class Source:
    """What the asked pictures begin from.

    pixels: (B, 3, H, W) in [-1, 1]. latents: (B, C, h, w) scaled. keep: None, or where the source stays: (B, 1, H, W)
    bool for pixels; latents stay where no pixel under them is to be painted. guides: guidance leads towards the source
    too, since its unconditional half goes on without what is put in.
    """

    pixels: Tensor
    latents: Tensor
    keep: Tensor | None
    guides: bool = False

    def hold_latents(self, scheduler: Any, noise: Tensor, last_step: int) -> Callable[[int, Tensor], Tensor]:
        """A function of (step, latents after it) that puts the source, under the next step's noise, where it stays.

        last_step: index of the last step, after which the source comes without noise.
        """
        keep = self.keep
        if keep is None:
            return lambda step, latents: latents
        factor = keep.shape[-1] // self.latents.shape[-1]
        kept = 1 - F.max_pool2d((~keep).to(self.latents.dtype), factor)  # (B, 1, h, w)

        def hold(step: int, latents: Tensor) -> Tensor:
            following = scheduler.timesteps[step + 1] if step < last_step else None
            return kept * noised(scheduler, self.latents, noise, following) + (1 - kept) * latents

        return hold

    def hold_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) with the source's own pixels, bit for bit, where it stays."""
        return pixels if self.keep is None else torch.where(self.keep, self.pixels, pixels)


def make_source(
    vae: Any,
    image: Any,
    mask_image: Any,
    *,
    count: int,
    size: tuple[int, int],
    device: torch.device,
) -> Source:
    """Scale pictures to cover `size` (height, width), cut the centre, and encode them (the mean of the posterior).

    Args:
        image: one picture, or one for each of `count`; PIL, or a tensor (3, H, W) in [-1, 1].
        mask_image: None, or likewise; white (over 50 %) = repaint. Tensors (1, H, W) in [0, 1].
    Raises:
        PromptError: another number of pictures, something that is no picture, a tensor of another size, or a mask of
            another shape than its picture.
    """
    pictures = _one_each(image, count, "image")
    pixels = torch.stack([picture_pixels(picture, size, "image") for picture in pictures]).to(device)
    keep = None
    if mask_image is not None:
        masks = _one_each(mask_image, count, "mask_image")
        for picture, mask in zip(pictures, masks):
            _require_one_shape(picture, mask)
        keep = torch.stack([_keep_mask(mask, size) for mask in masks]).to(device)
    return Source(pixels, encode_pixels(vae, pixels, device), keep)


def encode_pixels(vae: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the posterior's mean, scaled, (B, C, h, w) float32; a picture at a time."""
    latents = torch.cat([encode_moments(vae, picture[None], device)[0] for picture in pixels])
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def fingerprint(image: Any) -> str:
    """xxh3-64 over the sizes and pixels of one or several pictures, for the recipe: 16 hex digits."""
    digest = xxhash.xxh3_64()
    for picture in image if isinstance(image, (list, tuple)) else [image]:
        if isinstance(picture, Image.Image):
            digest.update(f"{picture.mode}{picture.size}".encode() + picture.tobytes())
        elif isinstance(picture, Tensor):
            values = picture.detach().float().cpu().contiguous()
            digest.update(f"{tuple(values.shape)}".encode() + values.numpy().tobytes())
        else:
            raise PromptError(f"{repr(picture)[:80]} is no picture; give a PIL image or a tensor")
    return digest.hexdigest()


def pictures_for(image: Any, count: int, name: str) -> list[Any]:
    """The pictures of an argument: one for all `count` that are drawn, or one each. Raises PromptError for others."""
    if isinstance(image, Tensor) and image.ndim == 4:
        image = list(image)
    pictures = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(pictures) not in (1, count):
        raise PromptError(f"{name} has {len(pictures)} pictures for {count} that are drawn; give one, or one each")
    return pictures


def _one_each(image: Any, count: int, name: str) -> Sequence[Any]:
    pictures = pictures_for(image, count, name)
    return pictures * count if len(pictures) == 1 else pictures


def picture_pixels(picture: Any, size: tuple[int, int], name: str) -> Tensor:
    """(3, H, W) in [-1, 1]: a PIL picture scaled to cover `size` and cut, or a tensor of that size as it is.

    Raises:
        PromptError: something else; `name` is the argument's.
    """
    if isinstance(picture, Image.Image):
        return to_tensor(resize_and_crop(picture.convert("RGB"), size)[0])
    return _checked(picture, (3, *size), name).float()


def _keep_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """(1, H, W) bool, True = the source stays."""
    if isinstance(mask, Image.Image):
        # Nearest, as a mask has no levels in between.
        grey = mask.convert("L")
        box = resize_and_crop(grey, size)[1]
        scaled = grey.resize((size[1], size[0]), Image.Resampling.NEAREST, box=box)
        return torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(1, *size) < 128
    return _checked(mask, (1, *size), "mask_image") <= 0.5


def _require_one_shape(picture: Any, mask: Any) -> None:
    """A mask of another ratio would be cut otherwise than its picture, and repaint the wrong place."""
    if not (isinstance(picture, Image.Image) and isinstance(mask, Image.Image)):
        return
    width, height = picture.size
    if abs(mask.width * height - mask.height * width) > max(width, height, *mask.size):  # a pixel more or less
        raise PromptError(
            f"mask_image is {mask.width}x{mask.height} px, image {width}x{height} px; give one of the same shape"
        )


def _checked(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise PromptError(f"{name}={repr(value)[:80]} is no picture; give a PIL image or a tensor {shape}")
    if tuple(value.shape) != shape:
        raise PromptError(f"{name} of shape {tuple(value.shape)} must be {shape}; give a PIL image to have it scaled")
    return value
