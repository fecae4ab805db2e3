"""One request to pictures on disk: the pipeline's call, with progress, previews and recipes."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import PromptError
from diffusion.images import to_pil
from diffusion.inference.batch import recipe_facts
from diffusion.inference.control import condition_pixels
from diffusion.inference.pipeline import PixArtPipeline
from diffusion.inference.previews import LatentPreview
from diffusion.inference.recipe import save_png
from diffusion.inference.sizes import parse_directives
from diffusion.inference.solvers import make_scheduler, scheduler_predicts
from diffusion.inference.styles import apply_style
from diffusion.web.asking import Asked
from diffusion.web.jobs import Job, Progress, Stopped
from diffusion.web.loras import Loras
from diffusion.web.settings import MAX_SEED, Limits


class Artist:
    """Draws what jobs ask for, one picture at a time: the memory it takes does not grow with their number."""

    def __init__(
        self,
        pipeline: PixArtPipeline,
        preview: LatentPreview,
        *,
        model: str,
        loras: Loras,
        limits: Limits,
        output: Path,
        keep_pictures: int,
    ) -> None:
        self.pipeline, self.preview, self.limits = pipeline, preview, limits
        self.loras = loras
        self._output, self._keep = output, keep_pictures
        self._facts = {
            controlled: recipe_facts(pipeline, model, controlled=controlled)
            for controlled in ([False] if pipeline.controlnet is None else [False, True])
        }

    def draw(self, job: Job) -> None:
        """Draw all pictures of a job into `job.paths`, telling of every step.

        Raises:
            PixArtError: the request or the model refuses. Stopped: the job was cancelled.
        """
        asked, pipeline = job.asked, self.pipeline
        kind = scheduler_predicts(pipeline.scheduler)
        pipeline.scheduler = make_scheduler(asked.solver, base_config=pipeline.scheduler.config, prediction_type=kind)
        text, settings = self._settings(asked)
        seeds = [(asked.seed + number) % (MAX_SEED + 1) for number in range(asked.pictures)]
        recipes = pipeline.recipes([text] * len(seeds), seed=seeds, **settings)
        applied = self.loras.apply(pipeline, asked.lora, asked.lora_scale)
        given = {**settings, **self._captions(text, settings, recipes[0])}
        for number, (seed, recipe) in enumerate(zip(seeds, recipes), start=1):
            output = pipeline(seed=seed, callback_on_step_end=self._follow(job, number, recipe), **given)
            full = {
                **recipe,
                **self._facts[asked.mode == "edges"],
                **applied,
                "asked": {**asked.choices(), "seed": seed},
            }
            job.paths.append(self._save(output.images[0], full))
            job.seeds.append(seed)

    def edges(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """What the ControlNet will follow in a picture, at the size that is drawn."""
        pipeline = self.pipeline
        pipeline._bring("edge_detector")
        device = pipeline.execution_device
        with torch.no_grad():
            pixels = condition_pixels(image, pipeline.edge_detector, count=1, size=(height, width), device=device)
        return to_pil(pixels[0].cpu())

    def _settings(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        """The styled prompt without directives, and the arguments of the pipeline's call."""
        prompt, negative = apply_style(asked.style, asked.prompt, asked.negative_prompt.strip() or None)
        sized = parse_directives(prompt, self.pipeline.default_size)
        height, width = sized.height or asked.height, sized.width or asked.width
        if max(height, width) > self.limits.max_side_px:
            raise PromptError(f"{width}x{height} px is too large here; at most {self.limits.max_side_px} px a side")
        edits, edges = asked.mode in ("image", "inpaint"), asked.mode == "edges"
        return sized.text, {
            "negative_prompt": negative,
            "num_inference_steps": asked.steps,
            "guidance_scale": float(asked.guidance_scale),
            "height": height,
            "width": width,
            "use_resolution_binning": sized.binned,
            "image": asked.image if edits else None,
            "mask_image": asked.mask if asked.mode == "inpaint" else None,
            "strength": float(asked.strength) if edits else 1.0,
            "control_image": asked.control_image if edges else None,
            "controlnet_conditioning_scale": float(asked.control_strength) if edges else 1.0,
        }

    def _captions(self, text: str, settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Embeddings for all pictures of a job, so that T5 works (and visits the card) once."""
        guided = recipe["null_caption"] == "t5_empty" and settings["guidance_scale"] > 1
        texts = [text, settings["negative_prompt"] or ""] if guided else [text]
        embeds, mask = self.pipeline.encode_captions(texts, clean_caption=recipe.get("clean_caption", False))
        given: dict[str, Any] = {"prompt_embeds": embeds[:1], "prompt_attention_mask": mask[:1]}
        if guided:
            given |= {"negative_prompt_embeds": embeds[1:], "negative_prompt_attention_mask": mask[1:]}
            given["negative_prompt"] = None
        return given

    def _follow(self, job: Job, number: int, recipe: Mapping[str, Any]) -> Any:
        """Tell that picture `number` begins; returns the callback for its steps."""
        asked = job.asked
        begun = min(int(asked.steps * asked.strength), asked.steps) if "strength" in recipe else asked.steps
        offset = asked.steps - begun

        def tell(step: int, latents: Tensor | None) -> None:
            if job.cancelled:
                raise Stopped
            preview = None if latents is None else self.preview(latents)[0]
            job.tell(
                Progress(
                    "drawing",
                    picture=number,
                    pictures=asked.pictures,
                    step=step,
                    steps=max(begun, 1),
                    preview=preview,
                    paths=tuple(job.paths),
                    seeds=tuple(job.seeds),
                )
            )

        def callback(_: PixArtPipeline, step: int, timestep: int, state: dict[str, Tensor]) -> None:
            tell(step + 1 - offset, state["latents"])

        tell(0, None)
        return callback

    def _save(self, image: Any, recipe: Mapping[str, Any]) -> Path:
        day = self._output / datetime.date.today().isoformat()
        path = save_png(image, day / f"{uuid.uuid4().hex}.png", recipe)
        self._prune()
        return path

    def _prune(self) -> None:
        """Let the oldest pictures go."""
        kept = sorted(self._output.glob("*/*.png"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[: -self._keep]:
            path.unlink(missing_ok=True)
