"""Examples of a page: prompts, with pictures that its own model made of them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diffusion.images import decode_image
from diffusion.inference.batch import load_pipeline, slug
from diffusion.inference.previews import LatentPreview
from diffusion.inference.recipe import model_fingerprint
from diffusion.web.artist import Artist
from diffusion.web.asking import Asked
from diffusion.web.jobs import Job
from diffusion.web.loras import Loras
from diffusion.web.settings import Limits

SHIPPED = Path(__file__).with_name("examples")
_EMOJI = (
    ("red apple", 11),
    ("rocket", 3),
    ("fox", 5),
    ("sunflower", 2),
    ("birthday cake", 7),
    ("penguin", 1),
    ("smiling face with sunglasses", 4),
    ("astronaut: medium skin tone", 6),
)
_OFFICIAL = (
    ("a small cactus with a happy face in the Sahara desert", 0),
    ("an astronaut riding a horse through a field of tulips, oil painting", 1),
    ("a cosy library in a hollow tree at night, warm lamps, fireflies", 2),
    ("portrait of an old fisherman in the rain, 35mm photograph", 3),
    ("a paper boat on a puddle that mirrors a city of lights", 4),
    ("isometric model of a lighthouse on a rock, stormy sea", 5),
    ("a hummingbird made of stained glass", 6),
    ("a snow-covered mountain village at dawn, long exposure", 7),
    ("a bowl of ramen, overhead view, steam, studio light", 8),
)


@dataclass(frozen=True)
class Example:
    """A request, and a picture of it where there is one."""

    asked: Asked
    picture: Path | None

    @property
    def prompt(self) -> str:
        return self.asked.prompt


def examples_of(artist: Artist, folder: Path, *, draw: bool) -> list[Example]:
    """Examples for the model of an artist.

    Args:
        folder: where pictures of examples are kept, apart by model.
        draw: draw those that are missing, now.
    """
    fingerprint = model_fingerprint(artist.pipeline.transformer)
    shipped = json.loads((SHIPPED / "model.json").read_text()) if (SHIPPED / "model.json").is_file() else {}
    if shipped.get("model_fingerprint") == fingerprint:
        return [Example(asked, _file(SHIPPED, asked)) for asked in emoji_requests(artist)]
    own = folder / "examples" / fingerprint
    size, guidance = artist.pipeline.default_size, artist.pipeline.usual_guidance
    requests = [
        Asked(prompt, seed=seed, width=size, height=size, guidance_scale=guidance) for prompt, seed in _OFFICIAL
    ]
    for asked in requests:
        if draw and not _file(own, asked).is_file():
            draw_example(artist, asked, _file(own, asked))
    return [Example(asked, found if (found := _file(own, asked)).is_file() else None) for asked in requests]


def emoji_requests(artist: Artist) -> list[Asked]:
    """What the shipped pictures are drawn from."""
    guidance = artist.pipeline.usual_guidance
    return [Asked(prompt, seed=seed, steps=20, guidance_scale=guidance) for prompt, seed in _EMOJI]


def draw_example(artist: Artist, asked: Asked, path: Path, side_px: int = 256) -> None:
    """Draw one example and keep it small, as WebP."""
    job = Job(asked, "examples", "examples", lambda progress: None)
    artist.draw(job)
    picture = decode_image(job.paths[0])
    job.paths[0].unlink()
    picture.thumbnail((side_px, side_px))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="WEBP", quality=82)


def ship_examples(model: str) -> Path:
    """Draw the examples of the bundled model anew, into the package; returns their folder."""
    pipeline = load_pipeline(model, model)
    pipeline.set_progress_bar_config(disable=True)
    for old in SHIPPED.glob("*.webp"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        artist = Artist(
            pipeline,
            LatentPreview(pipeline.vae),
            model=model,
            loras=Loras(Path(scratch)),
            limits=Limits(),
            output=Path(scratch),
            keep_pictures=1000,
        )
        for asked in emoji_requests(artist):
            draw_example(artist, asked, _file(SHIPPED, asked))
    facts = {"model_fingerprint": model_fingerprint(pipeline.transformer)}
    (SHIPPED / "model.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return SHIPPED


def _file(folder: Path, asked: Asked) -> Path:
    return folder / f"{slug(asked.prompt)}-{asked.seed}.webp"
