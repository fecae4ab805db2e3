from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import CheckpointError
from diffusion.images import (
    decode_latents,
    encode_moments,
    labelled_grid,
    load_vae,
    resize_and_crop,
    to_pil,
    to_tensor,
)
from tests.tiny import tiny_vae


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=-1).round().astype(np.uint8))


def test_same_size_is_untouched() -> None:
    image = gradient(32, 24)
    resized, box = resize_and_crop(image, (24, 32))
    assert resized.tobytes() == image.tobytes()
    assert box == (0, 0, 32, 24)


def test_crop_alone_copies_pixels() -> None:
    image = gradient(32, 40)
    resized, box = resize_and_crop(image, (32, 32))
    assert box == (0, 4, 32, 36)
    assert resized.tobytes() == image.crop((0, 4, 32, 36)).tobytes()


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 100), (33, 77), (1, 300)])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (32, 32)])
def test_box_is_centred_covers_and_keeps_the_aspect(width: int, height: int, size: tuple[int, int]) -> None:
    resized, (left, top, right, bottom) = resize_and_crop(gradient(width, height), size)
    assert (resized.height, resized.width) == size
    assert (left + right) / 2 == pytest.approx(width / 2)
    assert (top + bottom) / 2 == pytest.approx(height / 2)
    assert (bottom - top) / (right - left) == pytest.approx(size[0] / size[1])
    assert min(left, top) == pytest.approx(0)


def test_agrees_with_resizing_first_and_cropping_then() -> None:
    image = gradient(200, 120)
    ours = np.asarray(resize_and_crop(image, (60, 60))[0]).astype(int)
    theirs = np.asarray(image.resize((100, 60), Image.Resampling.BICUBIC).crop((20, 0, 80, 60))).astype(int)
    assert np.abs(ours - theirs).max() <= 3


def test_tensor_round_trip_is_exact() -> None:
    image = gradient(20, 12)
    pixels = to_tensor(image)
    assert pixels.shape == (3, 12, 20)
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    assert to_pil(pixels).tobytes() == image.tobytes()


def test_to_pil_clips_and_checks_shape() -> None:
    assert to_pil(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        to_pil(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="not RGB"):
        to_tensor(Image.new("L", (2, 2)))


def test_moments_are_the_posterior_and_decoding_undoes_the_scale() -> None:
    vae = tiny_vae()
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_moments(vae, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(mean).sample
    assert mean.shape == (2, 4, 8, 4)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, (0.5 * posterior.logvar).exp())
    torch.testing.assert_close(decode_latents(vae, mean * vae.config.scaling_factor), decoded, rtol=1e-4, atol=1e-5)


def test_grid_wraps_long_captions_and_keeps_pictures_whole() -> None:
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "lime", "blue")]
    short = labelled_grid(pictures, ["a", "b", "c"], columns=2)
    long = labelled_grid(pictures, ["a", "word " * 60, "unbreakable" * 30], columns=2)
    assert short.width == long.width
    assert long.height > short.height
    colors = {color: count for count, color in long.getcolors(maxcolors=1 << 16)}
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert colors[color] == 64 * 64
    # The caption stays inside its cell: the outer margins are blank.
    pixels = np.asarray(long)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, -4:] == 255).all()


def test_grid_arguments() -> None:
    with pytest.raises(ValueError, match="1 pictures and 2 labels"):
        labelled_grid([Image.new("RGB", (4, 4))], ["a", "b"], columns=1)
    with pytest.raises(ValueError, match="columns=0"):
        labelled_grid([Image.new("RGB", (4, 4))], ["a"], columns=0)


def test_vae_is_loaded_from_a_pipeline_or_named_when_it_cannot(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(str(tmp_path / "vae"))
    for folder in (tmp_path, tmp_path / "vae"):
        loaded = load_vae(folder)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        torch.testing.assert_close(loaded.state_dict(), tiny_vae().state_dict())
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="vae: the VAE cannot be loaded"):
        load_vae(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_vae(tmp_path.parent)
