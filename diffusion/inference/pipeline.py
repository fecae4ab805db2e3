"""From prompts to pictures. Legend: P prompts, B pictures, L text tokens, C text width, h x w latent size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn import functional as F

from diffusion.errors import PromptError
from diffusion.images import crop_box_for, decode_latents, resize_and_crop, to_pil
from diffusion.inference.conditions import Conditions, size_conditions, with_null_caption, with_stored_null_caption
from diffusion.inference.control import condition_pixels
from diffusion.inference.denoising import Start, denoise, guide, initial_noise, picture_generators, require_finite
from diffusion.inference.editing import Source, encode_pixels, fingerprint, make_source
from diffusion.inference.parts import PipelineParts
from diffusion.inference.requests import ModelFacts, SamplingRequest
from diffusion.inference.sizes import warn_of_untrained_area
from diffusion.inference.solvers import scheduler_predicts, solver_name, takes_variance

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


class PixArtPipeline(PipelineParts):
    """Sampler around the native network; opens and writes stock `PixArtAlphaPipeline` folders.

    Same prompt, seed and scheduler give the picture of stock diffusers (`use_resolution_binning=False`,
    `clean_caption=False`).
    """

    _interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback, as with diffusers' pipelines, to stop after that step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        guidance_channels: int | None = None,
        height: int | None = None,
        width: int | None = None,
        use_resolution_binning: bool = False,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        null_caption: str | None = None,
        clean_caption: bool | None = None,
        max_sequence_length: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
        control_image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> PixArtOutput:
        """Draw pictures: all of the first prompt, then all of the second, ...

        Args:
            prompt: one or P texts; or prompt_embeds (P, L, C) with prompt_attention_mask (P, L).
            negative_prompt: what guidance leads away from, in place of the null caption; one, or one a prompt. Or
                negative_prompt_embeds (1 or P, L, C) with negative_prompt_attention_mask.
            guidance_scale: classifier-free guidance; <= 1 = none, one pass a step.
            guidance_channels: latent channels it acts on; None = all, 3 = as the original's IDDPM sampler.
            height, width: px, multiples of 16; None = the model's training size.
            use_resolution_binning: draw the trained size that is nearest in ratio, then scale and cut to
                height x width, which may be any.
            seed: picture i of this call uses seed + i; a list gives one a picture; None = random (see the recipes).
                A picture is the same whatever batch it is drawn in, with stochastic solvers too.
            generator: instead of seed: one a picture.
            latents: (B, 4, h, w) of N(0, 1), the noise to begin with instead of the generators'.
            null_caption: "t5_empty", T5("") under its own mask (diffusers), or "stored", the model's null embedding
                under the caption's mask (native official files); None = as the pipeline's attribute says.
            clean_caption, max_sequence_length: see `prepare_prompt`, `encode_captions`; None = the pipeline's.
            image: begin from a picture (PIL or tensor, one or one each); strength: share of the steps that repaint it,
                0 = the VAE's round trip, 1 = noise alone.
            mask_image: white is repainted, black keeps the pixels of `image` bit for bit.
            control_image: condition of the ControlNet (PIL or tensor, one or one each): edges, white on black, or with
                an edge detector any picture; None = the base alone. controlnet_conditioning_scale: factor of all that
                the ControlNet adds, in both passes of guidance; 1 as trained, 0 = exactly the base.
            output_type: "pil", "pt", "np" or "latent"; see `PixArtOutput`. return_dict: False = the tuple (images,).
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": ...}) after each step; latents of
                the dict it returns replace the current ones.
        Raises:
            PromptError: an argument outside its range. NumericalError: a stage gives values that are not finite.
        """
        given = locals()
        request = SamplingRequest(model=self._facts, **{name: given[name] for name in _REQUEST_FIELDS})
        self._require_fitting_scheduler()
        warn_of_untrained_area(self.default_size, *request.drawn_size)
        self._interrupt = False
        generators, seeds = picture_generators(request.count, seed, generator)
        recipes = request.recipes(solver_name(self.scheduler), seeds, _fingerprints(request))
        conditions = self._conditions(request, max_sequence_length)
        source = self._source(request)
        noise = self._noise(request, generators, latents)
        drawn = self._sample(request, conditions, noise, generators, source, callback_on_step_end)
        if self._interrupt:
            recipes = [{**recipe, "interrupted": True} for recipe in recipes]
        images = drawn if output_type == "latent" else self._decode(request, drawn, generators, source)
        self.maybe_free_model_hooks()
        return PixArtOutput(images, recipes) if return_dict else (images,)  # type: ignore[return-value]

    def recipes(self, prompt: Sequence[str], *, seed: Sequence[int], **arguments: Any) -> list[dict[str, Any]]:
        """The recipes that a call with these arguments will return, one a prompt; nothing is drawn."""
        defaults = {name: _CALL_DEFAULTS[name] for name in _REQUEST_FIELDS}
        request = SamplingRequest(model=self._facts, **{**defaults, **arguments, "prompt": list(prompt)})
        return request.recipes(solver_name(self.scheduler), list(seed), _fingerprints(request))

    def _require_fitting_scheduler(self) -> None:
        """Refuse a scheduler for another kind of model, set after loading."""
        given, wanted = scheduler_predicts(self.scheduler), self.transformer.config.prediction_type
        if given != wanted:
            raise PromptError(
                f"the transformer predicts {wanted}, the scheduler is for {given}; make one with "
                f"make_scheduler(..., prediction_type={wanted!r})"
            )

    @property
    def _facts(self) -> ModelFacts:
        config = self.transformer.config
        return ModelFacts(
            default_size=self.default_size,
            size_multiple=self.vae_factor * config.patch_size,
            channels=config.in_channels,
            null_caption=self.null_caption,
            clean_caption=self.clean_captions,
            has_controlnet=self.controlnet is not None,
        )

    def _conditions(self, request: SamplingRequest, max_length: int | None) -> Conditions:
        """Captions for every picture, under guidance with the null captions before them; sizes; a ControlNet's part."""
        device = self.execution_device

        def per_picture(rows: Tensor) -> Tensor:
            return rows.to(device).repeat_interleave(request.num_images_per_prompt, dim=0)

        embeds, mask = request.prompt_embeds, request.prompt_attention_mask
        null_embeds, null_mask = request.negative_prompt_embeds, request.negative_prompt_attention_mask
        texts = request.prompts if embeds is None else []
        needs_null = request.guided and request.null_caption != "stored" and null_embeds is None
        negatives = request.negative_prompts if needs_null else []
        if texts or negatives:  # one pass through T5, which a memory plan may have to bring for it
            rows, kept = self.encode_captions(
                [*texts, *negatives], clean_caption=request.clean_caption, max_sequence_length=max_length
            )
            if texts:
                embeds, mask = rows[: len(texts)], kept[: len(texts)]
            if negatives:
                null_embeds, null_mask = rows[len(texts) :], kept[len(texts) :]
        assert embeds is not None and mask is not None  # the request has checked it
        embeds, mask = per_picture(embeds), per_picture(mask)
        if request.guided and request.null_caption == "stored":
            embeds, mask = with_stored_null_caption(embeds, mask, self.transformer)
        elif null_embeds is not None and null_mask is not None and request.guided:
            if len(null_embeds) > 1:
                null_embeds, null_mask = per_picture(null_embeds), per_picture(null_mask)
            embeds, mask = with_null_caption(embeds, mask, null_embeds, null_mask)
        sizes = size_conditions(self.transformer, len(embeds), *request.drawn_size, device)
        return Conditions(embeds, mask, sizes, self._control(request))

    def _source(self, request: SamplingRequest) -> Source | None:
        if request.image is None:
            return None
        self._bring("vae")
        return make_source(
            self.vae,
            request.image,
            request.mask_image,
            count=request.count,
            size=request.drawn_size,
            device=self.execution_device,
        )

    def _control(self, request: SamplingRequest) -> Tensor | None:
        """Latents (B or with guidance 2B, C, h, w) that the ControlNet follows; None = the base alone."""
        if not request.controlled:
            return None
        self._bring("edge_detector")
        pixels = condition_pixels(
            request.control_image,
            self.edge_detector,
            count=request.count,
            size=request.drawn_size,
            device=self.execution_device,
        )
        self._bring("vae")
        latents = encode_pixels(self.vae, pixels, self.execution_device).expand(request.count, -1, -1, -1)
        return torch.cat([latents, latents]) if request.guided else latents  # guidance is towards the text alone

    def _noise(self, request: SamplingRequest, generators: list[torch.Generator], given: Tensor | None) -> Tensor:
        """(B, C, h, w) float32, drawn picture by picture unless given."""
        height, width = (side // self.vae_factor for side in request.drawn_size)
        shape = (self.transformer.config.in_channels, height, width)
        if given is None:
            return initial_noise(request.count, shape, generators, self.execution_device)
        if tuple(given.shape) != (request.count, *shape):
            raise PromptError(f"latents of shape {tuple(given.shape)} must be {(request.count, *shape)}")
        return given.to(self.execution_device, torch.float32)

    def _sample(
        self,
        request: SamplingRequest,
        conditions: Conditions,
        noise: Tensor,
        generators: list[torch.Generator],
        source: Source | None,
        callback: StepCallback | None,
    ) -> Tensor:
        """Noise to latents (B, C, h, w), float32 whatever the network's dtype."""
        network, keep_variance = self._network(request, conditions.control), takes_variance(self.scheduler)
        channels, steps = self.transformer.config.in_channels, request.num_inference_steps
        if request.first_step < steps:
            self._bring("transformer")

        free: Tensor | None = None  # latents without the source, where the unconditional half shall not see it

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            inputs = torch.cat([latents if free is None else free, latents]) if request.guided else latents
            # float32 timesteps whatever the network's dtype: bfloat16 would round 999 to 1000.
            timesteps = timestep.to(device=inputs.device, dtype=torch.float32).expand(len(inputs))
            output = network(inputs, timesteps, conditions.embeds, conditions.mask, **conditions.sizes).float()
            if not request.guided:
                return output if keep_variance else output[:, :channels]
            return guide(
                output,
                channels,
                request.guidance_scale,
                keep_variance=keep_variance,
                guided_channels=request.guidance_channels,
            )

        hold = None if source is None else source.hold_latents(self.scheduler, noise, steps - 1)
        with self.progress_bar(total=steps - request.first_step) as bar:

            def on_step(index: int, timestep: Tensor, latents: Tensor) -> Tensor:
                nonlocal free
                bar.update()
                if source is not None and source.guides:
                    free = latents
                if hold is not None:
                    latents = hold(index, latents)
                if callback is None:
                    return latents
                returned = callback(self, index, int(timestep), {"latents": latents})
                return latents if returned is None else returned.get("latents", latents)

            return denoise(
                predict,
                self.scheduler,
                noise,
                steps,
                generators=generators,
                on_step=on_step,
                start=None if source is None else Start(source.latents, request.first_step),
                stop=lambda: self._interrupt,
            )

    def _network(self, request: SamplingRequest, control: Tensor | None) -> Callable[..., Tensor]:
        """The base, or the ControlNet around it with its condition."""
        if control is None:
            return self.transformer  # type: ignore[no-any-return]
        assert self.controlnet is not None  # the request has checked it
        scale = request.controlnet_conditioning_scale
        return partial(self.controlnet, control_latents=control, condition_strength=scale)

    def _decode(
        self, request: SamplingRequest, latents: Tensor, generators: list[torch.Generator], source: Source | None
    ) -> Any:
        """Latents (B, C, h, w) to pictures, a few at a time."""
        self._bring("vae")
        at_once = max(1, _DECODE_PIXELS // (latents.shape[-2] * latents.shape[-1] * self.vae_factor**2))
        pixels = torch.cat(
            [
                decode_latents(self.vae, latents[i : i + at_once], self.execution_device, generators[i : i + at_once])
                for i in range(0, len(latents), at_once)
            ]
        )  # (B, 3, H, W)
        require_finite(pixels, "the pictures decoded by the VAE")
        if source is not None:
            pixels = source.hold_pixels(pixels)
        size = (request.height, request.width)
        if request.output_type == "pil":
            return [resize_and_crop(to_pil(picture), size)[0] for picture in pixels]
        if pixels.shape[-2:] != size:
            pixels = _resized(pixels, size)
        if request.output_type == "pt":
            return pixels
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


_CALL_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(PixArtPipeline.__call__).parameters.items()
}
_REQUEST_FIELDS = tuple(field.name for field in fields(SamplingRequest) if field.name != "model")


def _fingerprints(request: SamplingRequest) -> dict[str, str]:
    pictures = {name: getattr(request, name) for name in ("image", "mask_image", "control_image")}
    return {name: fingerprint(picture) for name, picture in pictures.items() if picture is not None}


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) scaled to cover `size` and cut in the centre, as `resize_and_crop` does with pictures."""
    left, top, right, bottom = (round(edge) for edge in crop_box_for(pixels.shape[-1], pixels.shape[-2], size))
    cut = pixels[:, :, top:bottom, left:right]
    return F.interpolate(cut, size=size, mode="bicubic", antialias=True, align_corners=False)
