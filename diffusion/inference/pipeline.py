"""From prompts to pictures. Legend: P prompts, B pictures, L text tokens, C text width, h x w latent size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from diffusion.checkpoints import load_transformer
from diffusion.images import decode_latents, load_vae, to_pil
from diffusion.inference.conditions import (
    Conditions,
    prepare_prompt,
    shortened,
    size_conditions,
    with_null_caption,
    with_stored_null_caption,
)
from diffusion.inference.denoising import denoise, guide, initial_noise, picture_generators, require_finite
from diffusion.inference.folders import load_scheduler, save_pipeline
from diffusion.inference.requests import SamplingRequest
from diffusion.inference.solvers import solver_name, takes_variance
from diffusion.text import CaptionEncoder

_logger = logging.getLogger(__name__)

StepCallback = Callable[["PixArtPipeline", int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]
_DECODE_PIXELS = 1024 * 1024  # decoded at once: the VAE's activations, not the network's, would fill the memory


@dataclass
class PixArtOutput(BaseOutput):
    """Pictures and how to make them again.

    images: list of PIL pictures; output_type "pt": (B, 3, H, W) in [-1, 1]; "np": (B, H, W, 3) in [0, 1]; "latent":
    (B, 4, h, w) scaled. recipes: one dict a picture (prompt, seed, solver, steps, guidance, size), for `save_png`.
    """

    images: Any
    recipes: list[dict[str, Any]]


class PixArtPipeline(DiffusionPipeline):
    """Sampler around the native network; opens and writes stock `PixArtAlphaPipeline` folders.

    Same prompt, seed and scheduler give the picture of stock diffusers (`use_resolution_binning=False`).
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        transformer: str | Path | None = None,
        ema: bool = False,
        algorithm: str | None = None,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
    ) -> PixArtPipeline:
        """Load a local pipeline folder.

        Args:
            folder: tokenizer, text_encoder, vae, scheduler, and transformer unless given.
            transformer: another transformer folder, or a `checkpoint-N` of a run; ema: its averaged weights.
            algorithm: solver name (see `make_scheduler`); None = the folder's scheduler.
            torch_dtype: of text encoder and transformer. vae_dtype: of the VAE; float16 overflows in many of them.
        Raises:
            CheckpointError: something is missing or damaged. PromptError: unknown algorithm.
        """
        encoder = CaptionEncoder.from_pretrained(folder, device=device, dtype=torch_dtype)
        scheduler = load_scheduler(folder, algorithm)
        vae = load_vae(folder, device=device, dtype=vae_dtype)
        source = folder if transformer is None else transformer
        network = load_transformer(source, ema=ema, device=device, dtype=torch_dtype)
        return cls(encoder.tokenizer, encoder.model, vae, network, scheduler)

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, dtype: torch.dtype | None = None
    ) -> None:
        """Write a new folder that stock diffusers opens; see `save_pipeline`."""
        save_pipeline(self, folder, dtype)

    @property
    def vae_factor(self) -> int:
        """Pixels a latent covers along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """Height and width in px of a picture when none are given: the model's training size."""
        return int(self.transformer.config.input_size) * self.vae_factor

    @torch.no_grad()
    def encode_captions(
        self, captions: Sequence[str], *, clean_caption: bool = False, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts -> embeds (P, L, C), mask (P, L) True = keep; L the longest.

        max_sequence_length: tokens after which a prompt is cut, with a notice; None = the model's (120, or 300).
        """
        limit = max_sequence_length
        if limit is None:
            limit = 120 if self.transformer is None else self.transformer.config.model_max_length
        encoder = CaptionEncoder(self.tokenizer, self.text_encoder, max_length=limit)
        embeds, mask = encoder.encode([prepare_prompt(text, clean=clean_caption) for text in captions])
        for part in encoder.dropped:
            _logger.warning("a prompt was cut at %d tokens; dropped: %s", limit, shortened(part))
        return require_finite(embeds, "the caption embeddings"), mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        null_caption: str = "t5_empty",
        clean_caption: bool = False,
        max_sequence_length: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_mask: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> PixArtOutput:
        """Draw pictures: all of the first prompt, then all of the second, ...

        Args:
            prompt: one or P texts; or prompt_embeds (P, L, C) with prompt_mask (P, L).
            negative_prompt: what guidance leads away from, in place of the null caption; one, or one a prompt. Or
                negative_prompt_embeds (1 or P, L, C) with negative_prompt_mask.
            guidance_scale: classifier-free guidance; <= 1 = none, one pass a step.
            height, width: px, multiples of 16; None = the model's training size.
            seed: picture i of this call uses seed + i; a list gives one a picture; None = random (see the recipes).
                A picture is the same whatever batch it is drawn in, with stochastic solvers too.
            generator: instead of seed: one a picture.
            null_caption: "t5_empty", T5("") under its own mask (diffusers), or "stored", the model's null embedding
                under the caption's mask (native official files).
            clean_caption, max_sequence_length: see `prepare_prompt`, `encode_captions`.
            output_type: "pil", "pt", "np" or "latent"; see `PixArtOutput`.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": ...}) after each step; latents of
                the dict it returns replace the current ones.
        Raises:
            PromptError: an argument outside its range. NumericalError: a stage gives values that are not finite.
        """
        config = self.transformer.config
        request = SamplingRequest(
            prompt,
            prompt_embeds,
            prompt_mask,
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_mask,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=self.default_size if height is None else height,
            width=self.default_size if width is None else width,
            size_multiple=self.vae_factor * config.patch_size,
            num_images_per_prompt=num_images_per_prompt,
            null_caption=null_caption,
            output_type=output_type,
        )
        generators, seeds = picture_generators(request.count, seed, generator)
        conditions = self._conditions(request, clean_caption, max_sequence_length)
        latents = self._sample(request, conditions, generators, callback_on_step_end)
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return PixArtOutput(images, request.recipes(solver_name(self.scheduler), seeds))

    def _conditions(self, request: SamplingRequest, clean_caption: bool, max_length: int | None) -> Conditions:
        """Captions repeated for every picture, under guidance with the null captions before them, and sizes."""

        def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
            return self.encode_captions(texts, clean_caption=clean_caption, max_sequence_length=max_length)

        def per_picture(rows: Tensor) -> Tensor:
            return rows.to(self.transformer.device).repeat_interleave(request.num_images_per_prompt, dim=0)

        embeds, mask = request.embeds, request.mask
        if embeds is None or mask is None:
            embeds, mask = encode(request.prompts)
        embeds, mask = per_picture(embeds), per_picture(mask)
        if request.guided and request.null_caption == "stored":
            embeds, mask = with_stored_null_caption(embeds, mask, self.transformer)
        elif request.guided:
            null_embeds, null_mask = request.negative_embeds, request.negative_mask
            if null_embeds is None or null_mask is None:
                null_embeds, null_mask = encode(request.negative_prompts)
            if len(null_embeds) > 1:
                null_embeds, null_mask = per_picture(null_embeds), per_picture(null_mask)
            embeds, mask = with_null_caption(embeds, mask, null_embeds, null_mask)
        return Conditions(embeds, mask, size_conditions(self.transformer, len(embeds), request.height, request.width))

    def _sample(
        self,
        request: SamplingRequest,
        conditions: Conditions,
        generators: list[torch.Generator],
        callback: StepCallback | None,
    ) -> Tensor:
        """Noise to latents (B, C, h, w), float32 whatever the network's dtype."""
        network, keep_variance = self.transformer, takes_variance(self.scheduler)
        channels = network.config.in_channels

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            inputs = torch.cat([latents, latents]) if request.guided else latents
            # float32 timesteps whatever the network's dtype: bfloat16 would round 999 to 1000.
            timesteps = timestep.to(device=inputs.device, dtype=torch.float32).expand(len(inputs))
            output = network(inputs, timesteps, conditions.embeds, conditions.mask, **conditions.sizes).float()
            if request.guided:
                return guide(output, channels, request.guidance_scale, keep_variance=keep_variance)
            return output if keep_variance else output[:, :channels]

        shape = (channels, request.height // self.vae_factor, request.width // self.vae_factor)
        noise = initial_noise(request.count, shape, generators, network.device)
        steps = request.num_inference_steps
        with self.progress_bar(total=steps) as bar:

            def on_step(index: int, timestep: Tensor, latents: Tensor) -> Tensor:
                bar.update()
                if callback is None:
                    return latents
                returned = callback(self, index, int(timestep), {"latents": latents})
                return latents if returned is None else returned.get("latents", latents)

            return denoise(predict, self.scheduler, noise, steps, generators=generators, on_step=on_step)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents (B, C, h, w) to pictures, a few at a time."""
        pixels_each = latents.shape[-2] * latents.shape[-1] * self.vae_factor**2
        chunks = latents.split(max(1, _DECODE_PIXELS // pixels_each))
        pixels = torch.cat([decode_latents(self.vae, chunk) for chunk in chunks])  # (B, 3, H, W)
        require_finite(pixels, "the pictures decoded by the VAE")
        if output_type == "pt":
            return pixels
        if output_type == "np":
            return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return [to_pil(picture) for picture in pixels]
