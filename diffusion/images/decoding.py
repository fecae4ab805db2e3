"""One way from a file of any origin to an RGB picture, or to an error that names the file."""

from __future__ import annotations

import io
import stat
import warnings
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


def decode_image(path: str | Path) -> Image.Image:
    """Decode a picture file to mode RGB, 8 bit.

    EXIF orientation is applied, transparency is composed over white, CMYK goes through its ICC profile when it has
    one, 16-bit grey is divided by 257, and of an animation the first frame is taken. Files above 100 MB or 64 Mpx are
    refused before decoding.

    Raises DataError naming the file and the reason.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file; a picture is expected here")
        if status.st_size == 0:
            raise DataError(f"{path}: the picture file is empty; replace or remove it")
        if status.st_size > MAX_PICTURE_BYTES:
            raise DataError(f"{path}: {status.st_size} bytes exceed the limit of {MAX_PICTURE_BYTES}; make it smaller")
        return _decode(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such picture file") from error
    except OSError as error:
        raise DataError(f"{path}: the picture cannot be read ({error}); replace or remove it") from error


def _decode(data: bytes, path: Path) -> Image.Image:
    try:
        # Pillow warns about large pictures and odd metadata; the limit below is ours, and odd metadata is harmless.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            width, height = image.size
            if width * height > MAX_PICTURE_PIXELS:
                raise DataError(f"{path}: {width}x{height} exceeds the limit of {MAX_PICTURE_PIXELS} pixels; shrink it")
            image.load()
            return _to_rgb(_upright(image), path)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: not a picture in a known format ({', '.join(_FORMATS)}); replace or remove it"
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated classes on damaged files
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise DataError(f"{path}: not a readable picture ({reason}); replace or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels, which are already decoded
        return image


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "I;16", "I;16L", "I;16B"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{path}: grey values outside 0..65535; save it with 8 or 16 bits")
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{path}: floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        converted = _through_profile(image)
        if converted is not None:
            return converted
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _through_profile(image: Image.Image) -> Image.Image | None:
    """CMYK -> RGB by the embedded profile; None when the profile is unusable."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
