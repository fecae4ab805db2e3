"""Pictures the other way round: the flips of training, for features that are encoded once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import ImageOps

from diffusion.features.sources.sample import Picture, Sample, Source
from diffusion.images import decode_bytes


@dataclass(frozen=True)
class MirroredPicture:
    """A picture with left and right exchanged, as PNG."""

    picture: Picture

    @property
    def place(self) -> str:
        return self.picture.place

    def read(self) -> bytes:
        """Raises DataError naming the place."""
        buffer = io.BytesIO()
        ImageOps.mirror(decode_bytes(self.picture.read(), self.place)).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def stat(self) -> str:
        return f"mirrored:{self.picture.stat()}"


def mirrored(source: Source) -> Source:
    """The same samples with mirrored pictures."""
    samples: Sequence[Sample] = [replace(sample, picture=MirroredPicture(sample.picture)) for sample in source.samples]
    return replace(source, samples=list(samples), rejected=[])
