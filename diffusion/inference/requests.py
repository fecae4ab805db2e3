"""What is asked of the sampler, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusion.errors import PromptError, did_you_mean
from diffusion.models import NULL_CAPTIONS

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
MAX_STEPS = 1000


@dataclass(frozen=True)
class SamplingRequest:
    """One call of the pipeline, with sizes filled in. Captions are texts, or embeddings encoded before.

    Args:
        prompt: one or P texts; or embeds (P, L, C) with mask (P, L).
        negative_prompt: None, one, or P texts; or negative_embeds (1 or P, L, C) with negative_mask.
        size_multiple: px a token covers, which height and width (px) must divide into.
    Raises:
        PromptError: names the argument, its value and the rule.
    """

    prompt: Any
    embeds: Tensor | None
    mask: Tensor | None
    negative_prompt: Any
    negative_embeds: Tensor | None
    negative_mask: Tensor | None
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    size_multiple: int
    num_images_per_prompt: int
    null_caption: str
    output_type: str

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_captions()

    @property
    def prompts(self) -> list[str]:
        """The P texts; empty when embeddings were given."""
        return [] if self.prompt is None else _as_texts(self.prompt, "prompt")

    @property
    def negative_prompts(self) -> list[str]:
        """One or P texts that take the null caption's place."""
        return [""] if self.negative_prompt is None else _as_texts(self.negative_prompt, "negative_prompt")

    @property
    def num_prompts(self) -> int:
        return len(self.prompts) if self.embeds is None else len(self.embeds)

    @property
    def count(self) -> int:
        """Pictures asked for."""
        return self.num_prompts * self.num_images_per_prompt

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def recipes(self, solver: str, seeds: list[int] | None) -> list[dict[str, Any]]:
        """How each picture can be made again; seeds None = generators were given, whose state is not known."""
        texts: list[str | None] = [*self.prompts] or [None] * self.num_prompts
        negatives: list[str | None] = [*self.negative_prompts]
        if self.negative_embeds is not None:
            negatives = [None]
        if len(negatives) == 1:
            negatives = negatives * self.num_prompts
        return [
            {
                "prompt": texts[index // self.num_images_per_prompt],
                "negative_prompt": negatives[index // self.num_images_per_prompt],
                "seed": None if seeds is None else seeds[index],
                "solver": solver,
                "steps": self.num_inference_steps,
                "guidance_scale": self.guidance_scale,
                "null_caption": self.null_caption,
                "height": self.height,
                "width": self.width,
            }
            for index in range(self.count)
        ]

    def _check_sizes(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if not _is_integer(value) or value < self.size_multiple or value % self.size_multiple:
                raise PromptError(f"{name}={value!r} must be a positive multiple of {self.size_multiple} px")
        steps, images, scale = self.num_inference_steps, self.num_images_per_prompt, self.guidance_scale
        if not _is_integer(steps) or not 1 <= steps <= MAX_STEPS:
            raise PromptError(f"num_inference_steps={steps!r} must be an integer in 1..{MAX_STEPS}")
        if not _is_integer(images) or images < 1:
            raise PromptError(f"num_images_per_prompt={images!r} must be an integer of at least 1")
        if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
            raise PromptError(f"guidance_scale={scale!r} must be a finite number >= 0 (1 = no guidance)")
        for name, choices in (("null_caption", NULL_CAPTIONS), ("output_type", OUTPUT_TYPES)):
            if getattr(self, name) not in choices:
                value = str(getattr(self, name))
                raise PromptError(f"{name}={value!r} is unknown; {did_you_mean(value, choices)}")

    def _check_captions(self) -> None:
        _check_one("prompt", self.prompt, self.embeds, self.mask)
        if self.prompt is None and self.embeds is None:
            raise PromptError("prompt=None: give prompt, or prompt_embeds with prompt_mask")
        _check_one("negative_prompt", self.negative_prompt, self.negative_embeds, self.negative_mask)
        negatives = self.negative_prompts
        if self.null_caption == "stored" and any(negatives):
            raise PromptError("negative_prompt replaces the null caption; use null_caption='t5_empty' with it")
        given = len(negatives) if self.negative_embeds is None else len(self.negative_embeds)
        if given not in (1, self.num_prompts):
            raise PromptError(
                f"negative_prompt has {given} texts for {self.num_prompts} prompts; give one, or one each"
            )


def _check_one(name: str, text: Any, embeds: Tensor | None, mask: Tensor | None) -> None:
    if text is not None and embeds is not None:
        raise PromptError(f"{name} and {name}_embeds are both given; give one of them")
    if (embeds is None) != (mask is None):
        raise PromptError(f"{name}_embeds and its mask belong together; give both")
    if embeds is not None and mask is not None and (embeds.ndim != 3 or embeds.shape[:2] != mask.shape):
        raise PromptError(f"{name}_embeds {tuple(embeds.shape)} must be (P, L, C) and its mask (P, L)")


def _as_texts(value: Any, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or len(texts) == 0 or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"{name}={repr(value)[:80]} must be a text or a non-empty list of texts")
    return list(texts)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
