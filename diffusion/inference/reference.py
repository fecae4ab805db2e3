"""Drawing beside a reference: one canvas of double width, the reference on its left, the picture asked for right.

The network sees both halves and carries colours, style and things over; nothing is trained for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from diffusion.errors import PromptError
from diffusion.images import resize_and_crop
from diffusion.inference.editing import Source
from diffusion.inference.pipeline import PixArtOutput, PixArtPipeline
from diffusion.inference.requests import SamplingRequest


class PixArtReferencePipeline(PixArtPipeline):
    """`PixArtPipeline` that draws beside a reference picture; made `from_pretrained` as that is.

    The unconditional half of guidance does not see the reference, so guidance leads towards it as well as the caption.
    """

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        reference_image: Image.Image,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> PixArtOutput:
        """Draw pictures of height x width, as `PixArtPipeline.__call__` does with `arguments`.

        Args:
            reference_image: PIL picture, scaled to cover the size and cut.
            output_type: "pil", or "pt" and "np" with the shapes of `PixArtOutput`.
        Raises:
            PromptError: an argument that the canvas leaves no room for, or outside its range.
        """
        taken = sorted(
            {"image", "mask_image", "strength", "latents", "control_image", "use_resolution_binning"} & arguments.keys()
        )
        if taken:
            raise PromptError(
                f"{taken[0]} cannot be given with a reference_image, which fills the canvas; leave it out"
            )
        if output_type not in ("pil", "pt", "np"):
            raise PromptError(f"output_type={output_type!r} must be 'pil', 'pt' or 'np' with a reference_image")
        if not isinstance(reference_image, Image.Image):
            raise PromptError(f"reference_image={repr(reference_image)[:80]} is no PIL picture")
        size = (self.default_size if height is None else height, self.default_size if width is None else width)
        canvas = Image.new("RGB", (2 * size[1], size[0]), "white")
        canvas.paste(resize_and_crop(reference_image.convert("RGB"), size)[0], (0, 0))
        mask = Image.new("L", canvas.size, 255)
        mask.paste(0, (0, 0, size[1], size[0]))
        output: PixArtOutput = super().__call__(
            prompt,
            image=canvas,
            mask_image=mask,
            strength=1.0,
            height=size[0],
            width=2 * size[1],
            output_type=output_type,
            **arguments,
        )
        images = output.images
        if output_type == "pil":
            images = [image.crop((size[1], 0, 2 * size[1], size[0])) for image in images]
        else:
            images = images[..., size[1] :] if output_type == "pt" else images[:, :, size[1] :]
        recipes = [{**recipe, "beside_reference": True} for recipe in output.recipes]
        return PixArtOutput(images, recipes) if return_dict else (images,)  # type: ignore[return-value]

    def _source(self, request: SamplingRequest) -> Source | None:
        source = super()._source(request)
        return None if source is None else replace(source, guides=True)
