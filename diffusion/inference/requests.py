"""What is asked of the sampler, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusion.errors import PromptError, did_you_mean
from diffusion.inference.sizes import MAX_SIDE_PX, binned_size
from diffusion.models import NULL_CAPTIONS

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
MAX_STEPS = 1000


@dataclass(frozen=True)
class ModelFacts:
    """What a request has to know of the model: sizes in px, latent and caption channels, conventions of its training.

    Args:
        default_size: side of a picture when none is given. size_multiple: px that a token covers.
        guidance_scale: when none is given. has_controlnet: whether it can follow a control_image.
    """

    default_size: int
    size_multiple: int
    channels: int
    caption_channels: int
    null_caption: str
    clean_caption: bool
    guidance_scale: float
    has_controlnet: bool


@dataclass(frozen=True)
class SamplingRequest:
    """One call of the pipeline. Captions are texts, or embeddings encoded before.

    Args:
        prompt: one or P texts; or prompt_embeds (P, L, C) with its mask (P, L).
        negative_prompt: None, one, or P texts; or embeds (1 or P, L, C) with its mask.
        guidance_scale, height, width, null_caption, clean_caption: None = the model's.
        others: see `PixArtPipeline.__call__`.
    Raises:
        PromptError: names the argument, its value and the rule.
    """

    model: ModelFacts
    prompt: Any
    prompt_embeds: Tensor | None
    prompt_attention_mask: Tensor | None
    negative_prompt: Any
    negative_prompt_embeds: Tensor | None
    negative_prompt_attention_mask: Tensor | None
    num_inference_steps: int
    guidance_scale: Any
    guidance_channels: int | None
    height: Any
    width: Any
    use_resolution_binning: bool
    num_images_per_prompt: int
    null_caption: Any
    clean_caption: Any
    image: Any
    mask_image: Any
    strength: float
    control_image: Any
    controlnet_conditioning_scale: float
    output_type: str

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            self._fill(name, self.model.default_size)
        self._fill("null_caption", "t5_empty" if self._has_negative() else self.model.null_caption)
        self._fill("clean_caption", self.model.clean_caption)
        self._fill("guidance_scale", self.model.guidance_scale)
        self._check_sizes()
        self._check_numbers()
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
        return len(self.prompts) if self.prompt_embeds is None else len(self.prompt_embeds)

    @property
    def count(self) -> int:
        """Pictures asked for."""
        return self.num_prompts * self.num_images_per_prompt

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def controlled(self) -> bool:
        """Whether a condition picture steers; at scale 0 the base draws alone, exactly."""
        return self.control_image is not None and self.controlnet_conditioning_scale > 0

    @property
    def drawn_size(self) -> tuple[int, int]:
        """(height, width) in px that the network draws: the asked one, or the trained size nearest in ratio."""
        if not self.use_resolution_binning:
            return self.height, self.width
        return binned_size(self.model.default_size, self.height, self.width)

    @property
    def first_step(self) -> int:
        """Steps that a source picture of this strength saves."""
        if self.image is None:
            return 0
        return self.num_inference_steps - min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    def recipes(self, solver: str, seeds: list[int] | None, sources: dict[str, str]) -> list[dict[str, Any]]:
        """How each picture can be made again.

        Args:
            seeds: None = generators were given, whose state is not known.
            sources: fingerprints of "image", "mask_image" and "control_image", where given.
        """
        texts: list[str | None] = [*self.prompts] or [None] * self.num_prompts
        negatives: list[str | None] = [*self.negative_prompts]
        if self.negative_prompt_embeds is not None and self.negative_prompt is None:
            negatives = [None]
        if len(negatives) == 1:
            negatives = negatives * self.num_prompts
        options: dict[str, Any] = dict(sources)
        if self.image is not None:
            options["strength"] = self.strength
        if self.control_image is not None:
            options["controlnet_conditioning_scale"] = self.controlnet_conditioning_scale
        if self.guidance_channels is not None:
            options["guidance_channels"] = self.guidance_channels
        if self.clean_caption:
            options["clean_caption"] = True
        if self.use_resolution_binning:
            options["drawn_size"] = list(self.drawn_size)
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
                **options,
            }
            for index in range(self.count)
        ]

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _has_negative(self) -> bool:
        return self.negative_prompt_embeds is not None or any(self.negative_prompts)

    def _check_sizes(self) -> None:
        multiple = 1 if self.use_resolution_binning is True else self.model.size_multiple
        for name in ("height", "width"):
            value = getattr(self, name)
            if not _is_integer(value) or value < multiple or value % multiple:
                raise PromptError(
                    f"{name}={value!r} must be a positive multiple of {self.model.size_multiple} px "
                    "(with use_resolution_binning, any positive integer)"
                )
            if value > MAX_SIDE_PX:
                raise PromptError(
                    f"{name}={value} must be at most {MAX_SIDE_PX} px; draw smaller and enlarge afterwards"
                )
        _ = self.drawn_size  # raises when the model's size has no table

    def _check_numbers(self) -> None:
        require_numbers(vars(self))
        images, guided = self.num_images_per_prompt, self.guidance_channels
        if not _is_integer(images) or images < 1:
            raise PromptError(f"num_images_per_prompt={images!r} must be an integer of at least 1")
        if guided is not None and (not _is_integer(guided) or not 1 <= guided <= self.model.channels):
            raise PromptError(f"guidance_channels={guided!r} must be an integer in 1..{self.model.channels}, or None")
        for name, choices in (("null_caption", NULL_CAPTIONS), ("output_type", OUTPUT_TYPES)):
            if getattr(self, name) not in choices:
                value = str(getattr(self, name))
                raise PromptError(f"{name}={value!r} is unknown; {did_you_mean(value, choices)}")
        if self.mask_image is not None and self.image is None:
            raise PromptError("mask_image is given without image; give the picture that it covers")
        if self.control_image is not None and not self.model.has_controlnet:
            raise PromptError("control_image needs a ControlNet; load the pipeline with controlnet=FILE (--controlnet)")

    def _check_captions(self) -> None:
        width = self.model.caption_channels
        _check_one("prompt", self.prompt, self.prompt_embeds, self.prompt_attention_mask, width)
        if self.prompt is None and self.prompt_embeds is None:
            raise PromptError("prompt=None: give prompt, or prompt_embeds with prompt_attention_mask")
        _check_one(
            "negative_prompt",
            self.negative_prompt,
            self.negative_prompt_embeds,
            self.negative_prompt_attention_mask,
            width,
        )
        if self.null_caption == "stored" and self._has_negative():
            raise PromptError("negative_prompt replaces the null caption; use null_caption='t5_empty' with it")
        embeds = self.negative_prompt_embeds
        given = len(self.negative_prompts) if embeds is None else len(embeds)
        if given not in (1, self.num_prompts):
            raise PromptError(
                f"negative_prompt has {given} texts for {self.num_prompts} prompts; give one, or one each"
            )


def require_numbers(settings: Mapping[str, Any]) -> None:
    """The rules for numbers that hold for every model, as `SamplingRequest` applies them.

    Args:
        settings: arguments of the pipeline's call, those that are given; a guidance_scale of None is the model's.
    Raises:
        PromptError: names the argument, its value and the rule.
    """
    steps, scale = settings.get("num_inference_steps", 1), settings.get("guidance_scale")
    strength, control = settings.get("strength", 1), settings.get("controlnet_conditioning_scale", 1)
    if not _is_integer(steps) or not 1 <= steps <= MAX_STEPS:
        raise PromptError(f"num_inference_steps={steps!r} must be an integer in 1..{MAX_STEPS}")
    if scale is not None and (not _is_finite(scale) or scale < 0):
        raise PromptError(f"guidance_scale={scale!r} must be a finite number >= 0 (1 = no guidance, 4.5 is usual)")
    if not _is_finite(strength) or not 0 <= strength <= 1:
        raise PromptError(f"strength={strength!r} must be a number in 0..1 (0 keeps the picture)")
    if not _is_finite(control) or control < 0:
        raise PromptError(
            f"controlnet_conditioning_scale={control!r} must be a finite number >= 0 (1 as trained, 0 = without)"
        )


def _check_one(name: str, text: Any, embeds: Tensor | None, mask: Tensor | None, width: int) -> None:
    if text is not None and embeds is not None:
        raise PromptError(f"{name} and {name}_embeds are both given; give one of them")
    if (embeds is None) != (mask is None):
        raise PromptError(f"{name}_embeds and {name}_attention_mask belong together; give both")
    if embeds is not None and mask is not None and (embeds.ndim != 3 or embeds.shape[:2] != mask.shape):
        raise PromptError(f"{name}_embeds {tuple(embeds.shape)} must be (P, L, C) and its mask (P, L)")
    if embeds is not None and embeds.shape[2] != width:
        raise PromptError(
            f"{name}_embeds have {embeds.shape[2]} channels, the transformer reads {width}; encode with its T5"
        )


def _as_texts(value: Any, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or len(texts) == 0 or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"{name}={repr(value)[:80]} must be a text or a non-empty list of texts")
    return list(texts)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
