from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import DataError
from diffusion.images import decode_image, decoding, picture_size


def pixel(path: Path, position: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(path)
    assert image.mode == "RGB"
    return image.getpixel(position)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparency_is_composed_over_white(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    layer = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    layer.putpixel((1, 1), (0, 0, 255, 255))
    layer.putpixel((2, 2), (0, 0, 0, 128))
    layer.save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    assert pixel(path) == (255, 255, 255)
    assert pixel(path, (1, 1)) == (0, 0, 255)
    assert pixel(path, (2, 2)) == (127, 127, 127)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert pixel(tmp_path / "a.png") == (255, 255, 255)
    assert pixel(tmp_path / "a.png", (1, 1)) == (40, 50, 60)


def test_sixteen_bit_grey_is_divided_by_257(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert [decode_image(tmp_path / "a.png").getpixel((x, 0))[0] for x in range(3)] == [0, 1, 255]


def test_one_bit_grey_cmyk_and_animation(tmp_path: Path) -> None:
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    frames = [Image.new("RGB", (4, 4), color) for color in ("lime", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "bit.png") == (255, 255, 255)
    assert pixel(tmp_path / "grey.png") == (7, 7, 7)
    red, green, blue = pixel(tmp_path / "cmyk.jpg")
    assert red > 200
    assert max(green, blue) < 60
    assert pixel(tmp_path / "moving.gif") == (0, 255, 0)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 2), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise puts it upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode_image(tmp_path / "a.jpg").size == (2, 6)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "empty"),
        ("page.jpg", b"<html><body>not found</body></html>", "known format"),
        ("noise.webp", bytes(range(256)), "known format"),
        ("vector.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "known format"),
    ],
)
def test_files_that_are_no_pictures_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{reason}"):
        decode_image(tmp_path / name)


def test_missing_file_folder_and_fifo(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: no such"):
        decode_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="not a regular file"):
        decode_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        decode_image(tmp_path / "pipe.png")


def test_truncated_picture_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=f"a.{suffix}"):
            decode_image(path)


def test_large_pictures_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(decoding, "MAX_PICTURE_PIXELS", 4999)
    with pytest.raises(DataError, match="100x50 exceeds the limit of 4999"):
        decode_image(tmp_path / "a.png")
    monkeypatch.setattr(decoding, "MAX_PICTURE_BYTES", 10)
    with pytest.raises(DataError, match="exceed the limit of 10"):
        decode_image(tmp_path / "a.png")


def test_mutated_files_give_a_picture_or_a_data_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(pixels).save(path)
        original = path.read_bytes()
        for _ in range(40):
            data = bytearray(original)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            with contextlib.suppress(DataError):  # any other class is a failure
                assert decode_image(path).mode == "RGB"


def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    from PIL import ImageCms

    # A profile whose red and blue are exchanged: seen through it, the stored red is a blue.
    primaries = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, blue = primaries.index(b"rXYZ"), primaries.index(b"bXYZ")
    swapped = bytearray(primaries)
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    description = swapped.index("sRGB".encode("utf-16-be"))
    swapped[description : description + 8] = "test".encode("utf-16-be")
    for name, profile in (("swapped", bytes(swapped)), ("srgb", primaries), ("damaged", b"no profile"), ("none", None)):
        Image.new("RGB", (2, 2), (250, 10, 10)).save(tmp_path / f"{name}.png", icc_profile=profile)
    assert pixel(tmp_path / "none.png") == pixel(tmp_path / "srgb.png") == pixel(tmp_path / "damaged.png")
    assert pixel(tmp_path / "none.png") == (250, 10, 10)
    red_now, _, blue_now = pixel(tmp_path / "swapped.png")
    assert blue_now > 200
    assert red_now < 60


def test_size_from_the_header_is_that_of_the_decoded_picture(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (6, 2)).save(tmp_path / "a.jpg", exif=exif)
        image = decode_image(tmp_path / "a.jpg")
        assert picture_size((tmp_path / "a.jpg").read_bytes(), "a.jpg") == (image.height, image.width)
    with pytest.raises(DataError, match=r"a\.jpg: .*known format"):
        picture_size(b"<html>", "a.jpg")
