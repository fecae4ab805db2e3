"""One way from a file of any origin to an RGB picture, or to an error that names the file."""

from __future__ import annotations

import contextlib
import io
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from diffusion.errors import DataError

MAX_PICTURE_BYTES = 100_000_000
MAX_PICTURE_PIXELS = 64_000_000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Only formats that Pillow decodes itself: EPS, for one, would start an external program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Pillow registers most formats lazily, and fails on a format list that names one it has not registered yet.
Image.init()
# Part of the fingerprint of stored features: raise it whenever a picture may be decoded or resized to other pixels.
PREPROCESSING_VERSION = "2"
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


def decode_image(path: str | Path) -> Image.Image:
    """`decode_bytes` of a picture file. Raises DataError naming the file and the reason."""
    return decode_bytes(read_picture(path), path)


def read_picture(path: str | Path) -> bytes:
    """Bytes of a picture file; not of a folder, a pipe or a file above 100 MB.

    Raises DataError naming the file and the reason.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file; a picture is expected here")
        if status.st_size > MAX_PICTURE_BYTES:
            raise DataError(f"{path}: {status.st_size} bytes exceed the limit of {MAX_PICTURE_BYTES}; make it smaller")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such picture file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"{path}: the picture cannot be read ({error}); replace or remove it") from error


def picture_size(data: bytes, place: object) -> tuple[int, int]:
    """(height, width) in px as `decode_bytes` would give them, from the header alone.

    Raises DataError naming `place` and the reason.
    """
    with _explained(place):
        image = _open(data, place)
        turned = image.getexif().get(_ORIENTATION) in _TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def decode_bytes(data: bytes, place: object) -> Image.Image:
    """Decode a picture to mode RGB, 8 bit, sRGB.

    EXIF orientation is applied, an embedded ICC profile is converted to sRGB, transparency is composed over white,
    16-bit grey is divided by 257, and of an animation the first frame is taken. Files above 100 MB or 64 Mpx are
    refused before decoding.

    Raises DataError naming `place` and the reason.
    """
    with _explained(place):
        image = _open(data, place)
        image.load()
        return _to_rgb(_upright(image), place)


def _open(data: bytes, place: object) -> Image.Image:
    if not data:
        raise DataError(f"{place}: the picture file is empty; replace or remove it")
    if len(data) > MAX_PICTURE_BYTES:
        raise DataError(f"{place}: {len(data)} bytes exceed the limit of {MAX_PICTURE_BYTES}; make it smaller")
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > MAX_PICTURE_PIXELS:
        raise DataError(
            f"{place}: {image.width}x{image.height} exceeds the limit of {MAX_PICTURE_PIXELS} pixels; shrink it"
        )
    return image


@contextlib.contextmanager
def _explained(place: object) -> Iterator[None]:
    """Whatever Pillow raises becomes a DataError in one line."""
    try:
        # Pillow warns about large pictures and odd metadata; the limit above is ours, and odd metadata is harmless.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{place}: not a picture in a known format ({', '.join(_FORMATS)}); replace or remove it"
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated classes on damaged files
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise DataError(f"{place}: not a readable picture ({reason}); replace or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels, which are already decoded
        return image


def _to_rgb(image: Image.Image, place: object) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{place}: grey values outside 0..65535; save it with 8 or 16 bits")
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{place}: floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        colours = _to_srgb(layer.convert("RGB"), image.info.get("icc_profile"))
        colours.putalpha(layer.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), colours).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    return _to_srgb(image, image.info.get("icc_profile")).convert("RGB")


def _to_srgb(image: Image.Image, profile_bytes: bytes | None) -> Image.Image:
    """Colours of an embedded ICC profile -> sRGB; a profile that is damaged or of another colour space says nothing."""
    if not profile_bytes or image.mode not in ("RGB", "L", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_bytes))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted if converted is not None else image
