"""Prompts of a call as embeddings. Legend: P prompts, B pictures, L text tokens, C text width."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import PromptError
from diffusion.inference.conditions import (
    prepare_prompt,
    shortened,
    with_null_caption,
    with_stored_null_caption,
)
from diffusion.inference.denoising import EMBEDDED, require_finite
from diffusion.inference.fast import FastPath
from diffusion.inference.memory import ENCODE_BATCH
from diffusion.inference.requests import SamplingRequest
from diffusion.models import pad_captions
from diffusion.text import CaptionEncoder

_logger = logging.getLogger(__name__)


class CaptionEncoding:
    """Mixed into the pipeline: T5, and the captions that the network is given."""

    tokenizer: Any
    text_encoder: Any
    transformer: Any
    memory_plan: Any
    execution_device: Any
    clean_captions: bool
    _bring: Any
    _fast: FastPath | None

    @property
    def _max_tokens(self) -> int:
        return 120 if self.transformer is None else int(self.transformer.config.model_max_length)

    @torch.no_grad()
    def encode_captions(
        self, captions: Sequence[str], *, clean_caption: bool = False, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts -> embeds (P, L, C), mask (P, L) True = keep; L the longest.

        max_sequence_length: tokens after which a prompt is cut, with a notice; None = the model's (120, or 300).
        Raises PromptError when T5 was freed, NumericalError when embeddings are not finite.
        """
        embeds, mask = self._encode_captions(captions, clean_caption, max_sequence_length)
        return require_finite(embeds, EMBEDDED), mask

    def _encode_captions(self, captions: Sequence[str], clean: bool, max_length: int | None) -> tuple[Tensor, Tensor]:
        """As `encode_captions`, without a look at the result, for which a card would be waited for."""
        if self.text_encoder is None:
            raise PromptError("this pipeline has no text encoder; give prompt_embeds with prompt_attention_mask")
        limit = self._max_tokens if max_length is None else max_length
        self._bring("text_encoder")
        device = self.execution_device
        fast = {} if self._fast is None else self._fast.text_options(self.text_encoder, device, self.memory_plan)
        encoder = CaptionEncoder(self.tokenizer, self.text_encoder, max_length=limit, device=device, **fast)
        texts = [prepare_prompt(text, clean=clean) for text in captions]
        parts = []
        for start in range(0, len(texts), ENCODE_BATCH):
            parts.append(encoder.encode(texts[start : start + ENCODE_BATCH]))
            for dropped in encoder.dropped:
                _logger.warning("a prompt was cut at %d tokens; dropped: %s", limit, shortened(dropped))
        length = max(mask.shape[1] for _, mask in parts)
        embeds, masks = zip(*(pad_captions(*part, length) for part in parts))
        return torch.cat(embeds), torch.cat(masks)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        *,
        clean_caption: bool | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As diffusers' PixArtAlphaPipeline: embeds, mask, and those of the negative prompts or None.

        Shapes (P * images, L, C) and (P * images, L); what a call takes as prompt_embeds, prompt_attention_mask,
        negative_prompt_embeds and negative_prompt_attention_mask. Rows are not padded beyond the longest prompt.
        """
        clean = self.clean_captions if clean_caption is None else clean_caption

        def encode(texts: str | Sequence[str], count: int) -> tuple[Tensor, Tensor]:
            listed = [texts] * count if isinstance(texts, str) else list(texts)
            rows = self.encode_captions(listed, clean_caption=clean, max_sequence_length=max_sequence_length)
            return tuple(part.repeat_interleave(num_images_per_prompt, dim=0) for part in rows)  # type: ignore

        count = 1 if isinstance(prompt, str) else len(prompt)
        positive = encode(prompt, count)
        return (*positive, *encode(negative_prompt, count)) if do_classifier_free_guidance else (*positive, None, None)

    def _captions(self, request: SamplingRequest, max_length: int | None) -> tuple[Tensor, Tensor, int]:
        """Embeddings and mask of every picture's caption, under guidance with the null captions before them.

        Returns:
            (B or 2B, L, C), (B or 2B, L), and how many of the first captions have one token (`Conditions.alone`).
        """
        device, negatives = self.execution_device, _negatives_of(request)

        def per_picture(rows: Tensor) -> Tensor:
            return rows.to(device).repeat_interleave(request.num_images_per_prompt, dim=0)

        (embeds, mask), (null_embeds, null_mask) = self._encoded(request, negatives, max_length)
        embeds, mask = per_picture(embeds), per_picture(mask)
        if request.guided and request.null_caption == "stored":
            embeds, mask = with_stored_null_caption(embeds, mask, self.transformer)
        elif null_embeds is not None and null_mask is not None and request.guided:
            if len(null_embeds) > 1:
                null_embeds, null_mask = per_picture(null_embeds), per_picture(null_mask)
            embeds, mask = with_null_caption(embeds, mask, null_embeds, null_mask)
        if device.type != "cuda":  # there it is asked when the picture is on its way, see `_finish`
            require_finite(embeds, EMBEDDED)
        blank = self._fast is not None and bool(negatives) and not any(text.strip() for text in negatives)
        return embeds, mask, request.count if blank else 0

    def _encoded(self, request: SamplingRequest, negatives: Sequence[str], max_length: int | None) -> tuple[Any, Any]:
        """Embeddings and mask of the prompts, and of the negative ones (or None, None); those that are given as they
        are."""
        given = request.prompt_embeds, request.prompt_attention_mask
        null = request.negative_prompt_embeds, request.negative_prompt_attention_mask
        texts = request.prompts if request.prompt_embeds is None else []
        encode = partial(self._encode_captions, clean=request.clean_caption, max_length=max_length)
        beside = negatives if self._fast is None else []  # one pass through T5, which a memory plan may have to bring
        if texts or beside:
            rows, kept = encode([*texts, *beside])
            given = (rows[: len(texts)], kept[: len(texts)]) if texts else given
            null = (rows[len(texts) :], kept[len(texts) :]) if beside else null
        if self._fast is not None and negatives:
            key = (tuple(negatives), request.clean_caption, max_length)
            null = self._fast.negatives(key, self.text_encoder, partial(encode, negatives))
        return given, null


def _negatives_of(request: SamplingRequest) -> list[str]:
    """Negative prompts that T5 has to read."""
    needed = request.guided and request.null_caption != "stored" and request.negative_prompt_embeds is None
    return list(request.negative_prompts) if needed else []
