"""From prompts to pictures. Legend: P prompts, B pictures, L text tokens, C text width, h x w latent size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import BaseOutput
from torch import Tensor

from diffusion.errors import PromptError
from diffusion.images import SharedDecoder, decode_latents
from diffusion.inference.conditions import Conditions, size_conditions
from diffusion.inference.control import condition_pixels
from diffusion.inference.denoising import initial_noise, picture_generators
from diffusion.inference.drawn import Drawn
from diffusion.inference.editing import Source, encode_pixels, fingerprint, make_source
from diffusion.inference.fast import padded_length
from diffusion.inference.parallel import SharedForward
from diffusion.inference.parts import PipelineParts
from diffusion.inference.requests import ModelFacts, SamplingRequest
from diffusion.inference.sizes import warn_of_untrained_area
from diffusion.inference.solver_run import SolverRun
from diffusion.inference.solvers import is_capturable, scheduler_predicts, solver_name
from diffusion.ranks import Ranks

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
    _warned_sizes: frozenset[tuple[int, int]] = frozenset()
    _shared: SharedForward | None = None
    _shared_decoder: SharedDecoder | None = None

    def share_work(self, ranks: Ranks, *, row_groups: int | None = None) -> None:
        """Let all processes of a start draw each picture together; each gets it, so one of them writes it.

        From now on every process makes the same calls (a seed that is not given is agreed upon). Captions and solver
        are computed by each; the network's passes are shared out (`SharedForward`), and so is decoding by a KL-VAE
        (`SharedDecoder`), unless it decodes tiles. Comes after the memory plan, which has to be the same on all.

        Raises:
            ConfigError: a number of processes that does not fit the network.
        """
        network = self.transformer if self.controlnet is None else self.controlnet
        self.end_sharing()
        self._shared = SharedForward(network, ranks, row_groups=row_groups)
        tiled = ranks.any(getattr(self.vae, "use_tiling", False))
        self._shared_decoder = SharedDecoder(self.vae) if isinstance(self.vae, AutoencoderKL) and not tiled else None

    def end_sharing(self) -> None:
        """Draw alone again. To be called before the process group ends: graphs that hold its work would keep it."""
        if self._fast is not None:
            self._fast.forget_graphs()
        if self._shared is not None:
            self._shared.end()
        self._shared = self._shared_decoder = None

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
        guidance_scale: float | None = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PixArtOutput:
        """Draw pictures: all of the first prompt, then all of the second, ...

        Args:
            prompt: one or P texts; or prompt_embeds (P, L, C) with prompt_attention_mask (P, L).
            negative_prompt: what guidance leads away from, in place of the null caption; one, or one a prompt. Or
                negative_prompt_embeds (1 or P, L, C) with negative_prompt_attention_mask.
            guidance_scale: classifier-free guidance; <= 1 = none, one pass a step; None = the model's usual one.
            guidance_channels: latent channels it acts on; None = all, 3 = as the original's IDDPM sampler.
            height, width: px, multiples of 16; None = the model's training size.
            use_resolution_binning: draw the trained size that is nearest in ratio, then scale and cut to
                height x width, which may be any.
            seed: picture i of this call uses seed + i; a list gives one a picture; None = random (see the recipes).
                A picture is the same whatever batch it is drawn in, with stochastic solvers too.
            generator: instead of seed: one a picture, or one that draws the noise of all, picture after picture.
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
                the dict it returns replace the current ones. callback_on_step_end_tensor_inputs: no others are given.
        Raises:
            PromptError: an argument outside its range. NumericalError: a stage gives values that are not finite.
        """
        given = dict(locals())
        with self._device_known():
            output = self._finish(self._draw(given))
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images,)  # type: ignore[return-value]

    @torch.no_grad()
    def stream(self, calls: Iterable[Mapping[str, Any]]) -> Iterator[PixArtOutput]:
        """What calls with these arguments return, one after another.

        On a card the pictures of one call are decoded, and may be saved, while those of the next are denoised.
        """
        beside = torch.cuda.Stream(self.execution_device) if self._decodes_beside else None
        waiting: Drawn | None = None
        for arguments in calls:
            with self._device_known():
                drawn = self._draw({**_CALL_DEFAULTS, **arguments})
            if beside is None:
                yield self._finish(drawn)
                continue
            beside.wait_stream(torch.cuda.current_stream(self.execution_device))
            with torch.cuda.stream(beside):
                drawn.pixels = self._decode(drawn)
            if waiting is not None:
                yield self._finished_on(beside, waiting)
            waiting = drawn
        if beside is not None and waiting is not None:
            yield self._finished_on(beside, waiting)

    @property
    def _decodes_beside(self) -> bool:
        """Whether network and VAE are on a card together, without hooks that move them."""
        together = self.memory_plan is None or {"transformer", "vae"} <= self.memory_plan.together
        hooked = hasattr(self.transformer, "_hf_hook") or hasattr(self.vae, "_hf_hook")
        return self.execution_device.type == "cuda" and together and not hooked

    def _finished_on(self, stream: Any, drawn: Drawn) -> PixArtOutput:
        with torch.cuda.stream(stream):  # the other stream has the next pictures to denoise: nothing may wait for it
            output = self._finish(drawn)
        torch.cuda.current_stream(self.execution_device).wait_stream(stream)  # what the caller makes of tensors
        return output

    def _draw(self, given: Mapping[str, Any]) -> Drawn:
        """The arguments of a call to latents, which a card may still be working on."""
        request = SamplingRequest(model=self._facts, **{name: given[name] for name in _REQUEST_FIELDS})
        if self.vae is None and (request.output_type != "latent" or request.image is not None or request.controlled):
            raise PromptError("this pipeline has no VAE; ask for output_type='latent', or load it with one")
        if others := set(given["callback_on_step_end_tensor_inputs"]) - {"latents"}:
            raise PromptError(
                f"callback_on_step_end_tensor_inputs has {', '.join(sorted(others))}; only latents change"
            )
        self._require_fitting_scheduler()
        if request.drawn_size not in self._warned_sizes:  # once, not for every batch of a file of prompts
            self._warned_sizes = self._warned_sizes | {request.drawn_size}
            warn_of_untrained_area(self.default_size, *request.drawn_size)
        self._interrupt = False
        seed, generator = given["seed"], given["generator"]
        if self._shared is not None and seed is None and generator is None:
            seed = self._shared.ranks.broadcast(torch.randint(2**31, (request.count,)).tolist())
        generators, seeds = picture_generators(request.count, seed, generator)
        recipes = request.recipes(solver_name(self.scheduler), seeds, _fingerprints(request))
        conditions = self._conditions(request, given["max_sequence_length"])
        source = self._source(request)
        noise = self._noise(request, generators, given["latents"])
        latents = self._sample(request, conditions, noise, generators, source, given["callback_on_step_end"])
        if self._interrupt:
            recipes = [{**recipe, "interrupted": True} for recipe in recipes]
        return Drawn(request, conditions.embeds, latents, recipes, generators, source)

    def _finish(self, drawn: Drawn) -> PixArtOutput:
        """Latents to what was asked for. Raises NumericalError."""
        if drawn.request.output_type == "latent":
            drawn.require_finite()
            return PixArtOutput(drawn.latents, drawn.recipes)
        pixels = self._decode(drawn) if drawn.pixels is None else drawn.pixels
        drawn.require_finite()  # after the decoder has begun: asking waits for the card
        return PixArtOutput(drawn.pictures(pixels), drawn.recipes)

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
                f"make_scheduler(..., prediction_type={wanted!r}), or with base_config=pipe.scheduler.config"
            )

    @property
    def _facts(self) -> ModelFacts:
        if self.transformer is None:
            raise PromptError("this pipeline has no transformer and encodes prompts alone; load it with one to draw")
        config = self.transformer.config
        return ModelFacts(
            default_size=self.default_size,
            size_multiple=self.vae_factor * config.patch_size,
            channels=config.in_channels,
            caption_channels=config.caption_channels,
            null_caption=self.null_caption,
            clean_caption=self.clean_captions,
            guidance_scale=self.usual_guidance,
            has_controlnet=self.controlnet is not None,
        )

    def _conditions(self, request: SamplingRequest, max_length: int | None) -> Conditions:
        """Captions for every picture, under guidance with the null captions before them; sizes; a ControlNet's part."""
        embeds, mask, alone = self._captions(request, max_length)
        sizes = size_conditions(self.transformer, len(embeds), *request.drawn_size, self.execution_device)
        return Conditions(embeds, mask, sizes, self._control(request), alone)

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
        steps, fast = request.num_inference_steps, self._fast
        start = None if source is None else source.latents
        if start is not None and request.first_step == steps:
            return start
        self._bring("transformer")
        network: Any = self._shared or (self.transformer if conditions.control is None else self.controlnet)
        run = SolverRun(
            network,
            self.scheduler,
            steps,
            request.first_step,
            request.guided,
            request.guidance_channels,
            request.controlnet_conditioning_scale,
            alone=conditions.alone,
            embeds_time_ahead=fast is not None,
            shortcuts=None if fast is None else fast.settings.shortcuts,
        )
        if fast is not None:
            fast.prepare(
                self.controlnet or self.transformer, self.vae, self.execution_device, movable=self.memory_plan is None
            )
            conditions = conditions.padded(padded_length(conditions.embeds.shape[1]))
        tensors = run.tensors(noise, conditions, request.guidance_scale, start, generators)
        loop = partial(self._loop, run, generators, source, callback)
        if fast is None:
            return loop(tensors)
        weights = self.controlnet or self.transformer
        return fast.solve(run.key, run, loop, tensors, weights, self._obstacle(source, callback))

    def _loop(
        self,
        run: SolverRun,
        generators: list[torch.Generator],
        source: Source | None,
        callback: StepCallback | None,
        tensors: Mapping[str, Tensor],
    ) -> Tensor:
        """A run with all that happens between its steps."""
        free: Tensor | None = None  # latents without the source, where the unconditional half shall not see it
        hold = None if source is None else source.hold_latents(self.scheduler, tensors["noise"], run.steps - 1)

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

        with self.progress_bar(total=run.steps - run.first_step) as bar:
            return run(
                tensors,
                generators=generators,
                on_step=on_step,
                stop=lambda: self._interrupt,
                unconditional=lambda: free,
            )

    def _obstacle(self, source: Source | None, callback: StepCallback | None) -> str | None:
        """What keeps the solver's loop out of a CUDA graph, as the beginning of a sentence."""
        if callback is not None:
            return "a callback looks at every step"
        if source is not None and (source.keep is not None or source.guides):
            return "a mask is put in after every step"
        if not is_capturable(self.scheduler):
            return f"solver {solver_name(self.scheduler)} draws noise at every step"
        return "adapters are loaded and not fused" if self.get_list_adapters() else None

    def _decode(self, drawn: Drawn) -> Tensor:
        """Latents to pixels (B, 3, H, W), a few pictures at a time."""
        self._bring("vae")
        latents, generators, device = drawn.latents, drawn.generators, self.execution_device
        at_once = max(1, _DECODE_PIXELS // (latents.shape[-2] * latents.shape[-1] * self.vae_factor**2))
        parts = [slice(start, start + at_once) for start in range(0, len(latents), at_once)]

        def decode(some: Tensor, their_generators: Sequence[torch.Generator] | None = None) -> Tensor:
            if self._shared_decoder is not None and self._shared_decoder.fits(some.shape[-2]):
                return self._shared_decoder(some, device)
            return decode_latents(self.vae, some, device, their_generators)

        if self._fast is not None and self._fast.can_decode(self.vae):
            return torch.cat([self._fast.decode(self.vae, latents[part], decode) for part in parts])
        return torch.cat([decode(latents[part], generators[part]) for part in parts])


_CALL_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(PixArtPipeline.__call__).parameters.items()
}
_REQUEST_FIELDS = tuple(field.name for field in fields(SamplingRequest) if field.name != "model")


def _fingerprints(request: SamplingRequest) -> dict[str, str]:
    pictures = {name: getattr(request, name) for name in ("image", "mask_image", "control_image")}
    return {name: fingerprint(picture) for name, picture in pictures.items() if picture is not None}
