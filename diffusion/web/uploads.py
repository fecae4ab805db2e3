"""Inputs for pictures. What comes in goes through the one decoder and nothing else; addresses are never fetched."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import HTTPException
from gradio import component_meta
from gradio.components.base import server
from gradio.components.image_editor import EditorData
from gradio.data_classes import DataWithFiles, ImageData
from gradio_client.utils import is_http_url_like
from PIL import Image, ImageChops

from diffusion.errors import DataError, PixArtError, PromptError
from diffusion.images import decode_bytes
from diffusion.images.decoding import read_picture
from diffusion.inference.recipe import read_recipe

_MAX_LAYERS = 8
_MAX_STORED = 64  # editors whose strokes wait for their request
_MARKED_BELOW = 128  # darkest channel of a stroke, on white


# gradio writes a stub file beside the source of every component class, which an installed package may not allow.
_write_stub, component_meta.create_or_modify_pyi = component_meta.create_or_modify_pyi, lambda *_: None


class _Uploads:
    """Refuses addresses where gradio would download them."""

    async def async_move_resource_to_block_cache(self, url_or_file_path: Any) -> Any:
        _refuse_address(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)  # type: ignore[misc]

    def move_resource_to_block_cache(self, url_or_file_path: Any) -> Any:
        _refuse_address(url_or_file_path)
        return super().move_resource_to_block_cache(url_or_file_path)  # type: ignore[misc]


class PictureInput(_Uploads, gr.Image):
    """A picture to upload or paste; the function gets where it lies, undecoded, or None. See `decoded`."""

    def get_block_name(self) -> str:
        return "image"

    def preprocess(self, payload: ImageData | None) -> Any:
        return None if payload is None or payload.path is None else Path(payload.path)


class MaskEditor(_Uploads, gr.ImageEditor):
    """A picture to paint over; the function gets background and layers, undecoded, or None. See `decoded_mask`."""

    def get_block_name(self) -> str:
        return "imageeditor"

    def preprocess(self, payload: EditorData | None) -> Any:
        stored: Any = payload
        if payload is not None and payload.id is not None:
            stored = self.blob_storage.pop(payload.id, None)
        return None if stored is None or stored.background is None else stored

    @server
    def accept_blobs(self, data: DataWithFiles) -> None:
        """Strokes on their way; as gradio's, with a bound on their number, place and memory."""
        if not isinstance(data, DataWithFiles) or not data.files or "id" not in data.data or "type" not in data.data:
            raise HTTPException(400, "no strokes of a picture editor")
        index = str(data.data.get("index") or "0")
        if index != "null" and not (index.isdecimal() and int(index) < _MAX_LAYERS):
            raise HTTPException(400, f"at most {_MAX_LAYERS} layers can be painted")
        while len(self.blob_storage) >= _MAX_STORED:
            self.blob_storage.pop(next(iter(self.blob_storage)))
        super().accept_blobs(data)


class RecipeInput(_Uploads, gr.File):
    """A PNG that was drawn here; the function gets its recipe, or None."""

    def get_block_name(self) -> str:
        return "file"

    def preprocess(self, payload: Any) -> Any:
        if payload is None:
            return None
        path = Path(payload.root.path if hasattr(payload, "root") else payload.path)
        try:
            decoded(path)  # within the limits, and of a format that is safe to open
            return read_recipe(path)
        except PromptError as error:
            raise page_error(error) from None
        except DataError:
            raise page_error("this picture carries no recipe; give a PNG that was drawn here") from None


component_meta.create_or_modify_pyi = _write_stub


def _refuse_address(value: Any) -> None:
    if value is not None and is_http_url_like(str(value)):
        raise page_error("upload the picture itself; addresses are not fetched here")


def page_error(error: PixArtError | str) -> gr.Error:
    """A message for the page, which shows it as HTML: what a file or a client made it quote is no markup."""
    return gr.Error(html.escape(sentence(error), quote=False), print_exception=False)


def sentence(error: PixArtError | str) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def decoded(source: Any) -> Image.Image:
    """RGB from a path, bytes, or gradio's FileData. Raises PromptError in one line, without the server's path."""
    try:
        if isinstance(source, bytes):
            return decode_bytes(source, "the picture")
        path = source if isinstance(source, Path) else Path(source.path)
        return decode_bytes(read_picture(path), "the picture")
    except DataError as error:
        reason = str(error).split(": ", 1)[-1]
        raise PromptError(f"this picture cannot be used: {reason}") from None


def decoded_mask(painted: Any) -> tuple[Image.Image, Image.Image]:
    """The picture of a `MaskEditor` in RGB, and its mask in L, white = painted. Raises PromptError."""
    image = decoded(painted.background)
    mask = Image.new("L", image.size)
    for layer in painted.layers or []:
        if layer is not None:
            strokes = _strokes(decoded(layer)).resize(image.size, Image.Resampling.NEAREST)
            mask = ImageChops.lighter(mask, strokes)
    return image, mask


def _strokes(layer: Image.Image) -> Image.Image:
    """White where a layer, composed over white by the decoder, is painted."""
    red, green, blue = layer.split()
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
    return darkest.point(lambda value: 255 if value < _MARKED_BELOW else 0)
