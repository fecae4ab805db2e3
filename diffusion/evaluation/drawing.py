"""Draw every caption of a split and ask which picture each drawing shows; results as JSON, Markdown and a sheet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from diffusion.errors import DataError, PromptError, did_you_mean
from diffusion.evaluation.free_prompts import FreePrompt
from diffusion.evaluation.picture_features import fine_detail_energy
from diffusion.evaluation.retrieval import RANKS, Gallery, nearest_pictures, recall, to_pixels
from diffusion.features.sources import Sample
from diffusion.images import decode_latents, encode_moments, labelled_grid, to_pil, to_tensor
from diffusion.inference import PixArtPipeline, make_scheduler

JPEG_QUALITY = 75
# Captions of data/emoji by kind: their place in a row's list.
CAPTION_KINDS = {"label": 0, "label with keywords": 1, "a 3D emoji of": 2}


@dataclass(frozen=True)
class DrawingSettings:
    """How the pictures are drawn; picture i has seed + i.

    guidance_scale, solver: None = the model's usual one.
    """

    num_inference_steps: int = 20
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 16
    solver: str | None = None

    def __str__(self) -> str:
        solver = "" if self.solver is None else f"{self.solver}, "
        guidance = "" if self.guidance_scale is None else f", guidance {self.guidance_scale:g}"
        return f"{solver}{self.num_inference_steps} steps{guidance}"


@dataclass(frozen=True)
class Outcome:
    """Pictures of one row of the table, and what they were nearest to.

    One entry a drawing: its caption, the gallery row it is nearest to, and whether that is what was asked for.
    """

    figures: dict[str, Any]
    labels: list[str]
    pictures: list[Image.Image]
    nearest: list[int]
    right: list[bool]


def draw(pipeline: PixArtPipeline, prompts: Sequence[str], settings: DrawingSettings) -> list[Image.Image]:
    """One picture a prompt."""
    if settings.solver is not None:
        pipeline.scheduler = make_scheduler(settings.solver, base_config=pipeline.scheduler.config)
    pictures: list[Image.Image] = []
    with tqdm(total=len(prompts), unit="picture", desc="drawing", mininterval=1) as bar:
        for start in range(0, len(prompts), settings.batch_size):
            batch = list(prompts[start : start + settings.batch_size])
            output = pipeline(
                batch,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                seed=[settings.seed + start + index for index in range(len(batch))],
            )
            pictures += output.images
            bar.update(len(batch))
    return pictures


def caption_of(sample: Sample, kind: str) -> str:
    """The caption of a kind (see CAPTION_KINDS).

    Raises:
        PromptError: unknown kind. DataError: the picture has no such caption.
    """
    if kind not in CAPTION_KINDS:
        raise PromptError(f"caption kind {kind!r} is unknown; {did_you_mean(kind, CAPTION_KINDS)}")
    if len(sample.captions) <= CAPTION_KINDS[kind]:
        raise DataError(f"{sample.key} has no caption of kind {kind!r}")
    return sample.captions[CAPTION_KINDS[kind]]


def spread(rows: Sequence[int], limit: int | None) -> list[int]:
    """At most `limit` rows, evenly spaced."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // limit] for index in range(limit)]


def judge(
    gallery: Gallery, name: str, rows: Sequence[int], labels: Sequence[str], pictures: list[Image.Image]
) -> Outcome:
    """Recall of the pictures that were meant, and sharpness, of drawings of gallery rows.

    Figures: `picture_r1`, `picture_r5` (the very picture or a near duplicate of it), `concept_r1`, `concept_r5`,
    the same `colour_...` by plain colour, and `sharpness`: median over the drawings of their fine detail over the real
    picture's.
    """
    pixels = to_pixels(pictures)
    both, colour = gallery.distances(pixels)
    figures: dict[str, Any] = {"name": name, "pictures": len(rows)}
    wanted = {
        "picture": (gallery.groups, [gallery.groups[row] for row in rows]),
        "concept": (gallery.concepts, [gallery.concepts[row] for row in rows]),
    }
    near = nearest_pictures(both, gallery.groups, max(RANKS))
    for prefix, found in (("", near), ("colour_", nearest_pictures(colour, gallery.groups, max(RANKS)))):
        for level, (all_labels, wanted_labels) in wanted.items():
            for rank in RANKS:
                figures[f"{prefix}{level}_r{rank}"] = round(recall(found, all_labels, wanted_labels, rank), 4)
    figures["sharpness"] = round(float((fine_detail_energy(pixels) / gallery.detail[list(rows)]).median()), 4)
    right = [gallery.groups[found[0]] == gallery.groups[row] for found, row in zip(near, rows)]
    return Outcome(figures, list(labels), pictures, [found[0] for found in near], right)


def judge_free_prompts(
    gallery: Gallery, settings: DrawingSettings, prompts: Sequence[FreePrompt], pictures: list[Image.Image]
) -> Outcome:
    """Share of prompts whose drawing is nearest to a picture that a person would accept."""
    both, _ = gallery.distances(to_pixels(pictures))
    near = nearest_pictures(both, gallery.groups, 1)
    right = [prompt.accepts(gallery, found[0]) for prompt, found in zip(prompts, near)]
    figures = {
        "name": f"free prompts, {settings}",
        "pictures": len(prompts),
        "concept_r1": round(sum(right) / len(right), 4),
    }
    return Outcome(figures, [prompt.prompt for prompt in prompts], pictures, [found[0] for found in near], right)


def evaluate_captions(
    pipeline: PixArtPipeline,
    gallery: Gallery,
    splits: Sequence[str],
    kinds: Sequence[str],
    settings: Sequence[DrawingSettings],
    *,
    limit: int | None = None,
) -> list[Outcome]:
    """Draw captions of each kind and split under each of the settings.

    Args:
        limit: evenly spaced subset of at most this many captions of a split.
    """
    outcomes = []
    for split in splits:
        rows = spread(gallery.split(split), limit)
        for kind in kinds:
            captions = [caption_of(gallery.samples[row], kind) for row in rows]
            for setting in settings:
                drawn = draw(pipeline, captions, setting)
                outcomes.append(judge(gallery, f"{split}, {kind}, {setting}", rows, captions, drawn))
    return outcomes


def evaluate_free_prompts(
    pipeline: PixArtPipeline, gallery: Gallery, prompts: Sequence[FreePrompt], settings: Sequence[DrawingSettings]
) -> list[Outcome]:
    """Draw free prompts under each of the settings."""
    texts = [prompt.prompt for prompt in prompts]
    return [judge_free_prompts(gallery, setting, prompts, draw(pipeline, texts, setting)) for setting in settings]


def round_trips(gallery: Gallery, rows: Sequence[int], vae: Any) -> list[Outcome]:
    """The sanity rows: real pictures after JPEG and after the VAE must find themselves."""
    real = [gallery.samples[row].decode() for row in rows]
    labels = [gallery.samples[row].captions[0] for row in rows]
    trips = {f"real, JPEG {JPEG_QUALITY}": map(_through_jpeg, real), "real, VAE": _through_vae(real, vae)}
    return [judge(gallery, name, rows, labels, list(pictures)) for name, pictures in trips.items()]


def _through_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def _through_vae(images: Sequence[Image.Image], vae: Any, batch_size: int = 8) -> Iterable[Image.Image]:
    for start in range(0, len(images), batch_size):
        mean, _ = encode_moments(vae, torch.stack([to_tensor(image) for image in images[start : start + batch_size]]))
        yield from map(to_pil, decode_latents(vae, mean * vae.config.scaling_factor))


def write_outcomes(
    gallery: Gallery, outcomes: Sequence[Outcome], folder: Path, facts: dict[str, Any], *, shown: int = 64
) -> None:
    """`retrieval.json`, `retrieval.md`, and for each outcome `sheet-NAME.png` with at most `shown` of its drawings."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [outcome.figures for outcome in outcomes]
    (folder / "retrieval.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    (folder / "retrieval.md").write_text(markdown_table(rows), encoding="utf-8")
    for outcome in outcomes:
        chosen = spread(range(len(outcome.pictures)), shown)
        pairs = [_pair(outcome.pictures[i], gallery.samples[outcome.nearest[i]].decode()) for i in chosen]
        labels = [("" if outcome.right[i] else "[other] ") + outcome.labels[i] for i in chosen]
        name = "-".join(outcome.figures["name"].replace(",", " ").split())
        labelled_grid(pairs, labels, columns=8).save(folder / f"sheet-{name}.png")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures as a Markdown table; recalls in percent, what a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [_cell(key, row.get(key)) for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if key.endswith(tuple(f"_r{rank}" for rank in RANKS)) else str(value)


def _pair(drawn: Image.Image, real: Image.Image) -> Image.Image:
    """A drawing beside the real picture it is nearest to, at half size."""
    half = (drawn.width // 2, drawn.height // 2)
    sheet = Image.new("RGB", (2 * half[0], half[1]), "white")
    sheet.paste(drawn.resize(half, Image.Resampling.LANCZOS), (0, 0))
    sheet.paste(real.resize(half, Image.Resampling.LANCZOS), (half[0], 0))
    return sheet
