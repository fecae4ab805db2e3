"""The drawing page: components, what happens on each click, and nothing of how pictures are made."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusion.errors import PixArtError
from diffusion.inference.recipe import read_recipe
from diffusion.inference.sizes import binned_size
from diffusion.web.controls import (
    Controls,
    add_beginning,
    add_numbers,
    add_prompt,
    asked_from,
    values_from,
)
from diffusion.web.engine import Engine
from diffusion.web.examples import Example
from diffusion.web.jobs import FINAL, Progress
from diffusion.web.models import Variant
from diffusion.web.stage import recipe_table, stage
from diffusion.web.uploads import RecipeInput, decoded, page_error, sentence

_KEPT = 24  # pictures that a browser tab keeps in its gallery
_TOGGLE_THEME = "() => { document.body.classList.toggle('dark'); }"
_SHOW_STAGE = """() => {
  if (matchMedia('(max-width: 640px)').matches) document.querySelector('#stage').scrollIntoView({behavior: 'smooth'});
}"""  # on a phone it lies below the settings
# A picture that is done becomes the gallery's chosen one, whose thumbnail then takes the focus: not from a field that
# somebody types in, unless a press in the gallery or a Tab has just moved it.
_KEEP_FOCUS = """() => {
  let asked = false;
  addEventListener('pointerdown', event => { asked = !!event.target.closest('#gallery'); }, true);
  addEventListener('keydown', event => { asked = event.key === 'Tab'; }, true);
  addEventListener('focusin', event => {
    const from = event.relatedTarget, into = event.target.closest('#gallery');
    if (into && !asked && from && from.matches('input, textarea')) from.focus({preventScroll: true});
    asked = false;
  });
}"""
_HIDDEN: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# What may be refused goes through the queue: gradio shows errors of nothing else.
_SPEAKING = {**_HIDDEN, "queue": True, "concurrency_limit": None}


@dataclass
class _Results:
    """The components of the right side; history: paths of the tab's pictures, newest first; selected: index in it."""

    stage: Any
    gallery: Any
    recipe: Any
    download: Any
    reuse: Any
    begin: Any
    upload: Any
    history: Any
    selected: Any


def build_page(engine: Engine, variant: Variant, notice: str, examples: list[Example]) -> gr.Blocks:
    """The page of a variant around an engine. notice: Markdown above it, e.g. how to get the official model."""
    pipeline = engine.artist.pipeline
    limits, size = engine.settings.limits, variant.image_size or pipeline.default_size
    has_controlnet = pipeline.controlnet is not None

    def size_for(height: int, width: int) -> tuple[int, int]:
        with contextlib.suppress(PixArtError):
            tall, wide = binned_size(pipeline.default_size, height, width)
            return min(tall, limits.max_side_px), min(wide, limits.max_side_px)
        return pipeline.default_size, pipeline.default_size

    with gr.Blocks(title=variant.title, analytics_enabled=False, delete_cache=(600, 7200)) as page:
        _add_masthead(variant, notice, engine)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                parts = add_prompt()
                with gr.Row(elem_id="draw-row"):
                    draw = gr.Button("Draw", variant="primary", elem_id="draw-button", scale=3)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop-button", scale=1)
                parts |= add_beginning(variant, has_controlnet=has_controlnet)
                with gr.Accordion("Size, solver and seed", open=True):
                    loras = engine.artist.loras.names()
                    parts |= add_numbers(variant, limits, size, size_for, loras, pipeline.usual_guidance)
            with gr.Column(scale=6, min_width=320):
                results = _add_results()
        edges = parts.pop("edges")
        controls = Controls(**parts)
        _add_examples(examples, controls)
        _wire_drawing(engine, controls, results, draw)
        _wire_stop(engine, stop, results.stage)
        _wire_results(engine, controls, results)
        _wire_edges(engine, controls, edges)
        page.load(None, js=_KEEP_FOCUS, **_HIDDEN)
        page.unload(_leave(engine))
    page.queue(max_size=200, default_concurrency_limit=64)
    return page


def _add_masthead(variant: Variant, notice: str, engine: Engine) -> None:
    with gr.Row(elem_id="masthead"):
        gr.HTML(f"<h1>{variant.title}</h1><p>Pictures from words, by a Diffusion Transformer.</p>")
        if engine.settings.duplicate_button and engine.settings.behind_proxy:
            gr.DuplicateButton("Duplicate this Space")
        gr.Button("Dark / light", size="sm", elem_id="theme-button").click(None, js=_TOGGLE_THEME, **_HIDDEN)
    if notice:
        gr.Markdown(notice, elem_id="banner")


def _add_results() -> _Results:
    shown = gr.HTML('<div class="stage"><p class="empty">Your pictures appear here.</p></div>', elem_id="stage")
    gallery = gr.Gallery(
        label="Pictures",
        elem_id="gallery",
        columns=4,
        height=540,
        object_fit="contain",
        format="png",
        preview=True,
        interactive=False,
        buttons=["download", "fullscreen"],
    )
    with gr.Row(elem_id="result-row"):  # of use once there is a picture
        download = gr.DownloadButton("Download PNG", elem_id="download", size="sm", interactive=False)
        reuse = gr.Button("Reuse settings", elem_id="reuse", size="sm", interactive=False)
        begin = gr.Button("Begin from this picture", elem_id="begin", size="sm", interactive=False)
    with gr.Accordion("Recipe", open=False, elem_id="recipe-panel"):
        recipe = gr.HTML(recipe_table(None), elem_id="recipe")
        upload = RecipeInput(
            label="Settings of a PNG that was drawn here",
            file_types=[".png"],
            elem_id="recipe-upload",
            height=190,
        )
    return _Results(shown, gallery, recipe, download, reuse, begin, upload, gr.State([]), gr.State(0))


def _add_examples(examples: list[Example], controls: Controls) -> None:
    if not examples:
        return
    pictures = [(str(example.picture), example.prompt) for example in examples if example.picture is not None]
    if len(pictures) < len(examples):
        gr.Examples([[example.prompt] for example in examples], controls.prompt, label="Examples", elem_id="examples")
        return
    gr.Markdown("**Examples.** Choose one, then draw.")
    strip = gr.Gallery(
        pictures,
        label="Examples",
        show_label=False,
        elem_id="examples",
        columns=len(pictures),
        height="auto",
        allow_preview=False,
        interactive=False,
        object_fit="cover",
        buttons=[],
    )

    def take(event: gr.SelectData) -> list[Any]:
        example = examples[min(max(int(event.index), 0), len(examples) - 1)]
        return values_of_example(example)

    names = ["prompt", "negative_prompt", "style", "mode", "solver", "steps", "guidance_scale", "seed", "randomise"]
    strip.select(take, None, [getattr(controls, name) for name in names], **_HIDDEN)


def values_of_example(example: Example) -> list[Any]:
    """Prompt, negative prompt, style, mode, solver, steps, guidance, seed, randomise."""
    asked = example.asked
    return [asked.prompt, "", asked.style, "text", asked.solver, asked.steps, asked.guidance_scale, asked.seed, False]


def _wire_drawing(engine: Engine, controls: Controls, results: _Results, draw: Any) -> None:
    inputs = [*controls.all(), results.history]
    outputs = [
        results.gallery,
        controls.seed,
        results.stage,
        results.history,
        results.selected,
        results.recipe,
        results.download,
    ]

    async def run(
        # Spelled out, in the order of `Controls`: gradio names the arguments of the API after them.
        request: gr.Request, prompt: Any, negative_prompt: Any, style: Any, mode: Any, width: Any, height: Any,
        solver: Any, steps: Any, guidance_scale: Any, seed: Any, randomise: Any, pictures: Any, image: Any = None,
        strength: Any = None, painted: Any = None, control_image: Any = None, control_strength: Any = None,
        lora: Any = None, lora_scale: Any = None, history: Any = None,
    ) -> AsyncIterator[list[Any]]:  # fmt: skip
        given = [
            prompt, negative_prompt, style, mode, width, height, solver, steps, guidance_scale, seed, randomise,
            pictures, image, strength, painted, control_image, control_strength, lora, lora_scale,
        ]  # fmt: skip
        started = time.monotonic()
        finished = 0
        async for news in _progress_of(engine, given, request):
            text = stage(news, time.monotonic() - started)
            if len(news.paths) == finished:
                yield [gr.skip(), gr.skip(), text, *[gr.skip()] * 4]
            else:
                finished = len(news.paths)
                paths = [*map(str, reversed(news.paths)), *(history or [])][:_KEPT]
                yield _shown(paths, text, seed=news.seeds[0])
            if news.stage == "failed":  # stays on the page, and is an error for the API
                raise page_error(news.message)

    listeners: dict[str, Any] = {
        "inputs": inputs,
        "outputs": outputs,
        "concurrency_limit": None,
        "show_progress": "hidden",
    }
    for listen in (draw.click, controls.prompt.submit):  # first: listeners of an event run one after the other
        listen(None, js=_SHOW_STAGE, **_HIDDEN)
    clicked = draw.click(run, api_name="draw", trigger_mode="multiple", **listeners)
    entered = controls.prompt.submit(run, api_visibility="private", trigger_mode="multiple", **listeners)
    buttons = [results.download, results.reuse, results.begin]
    for drawn in (clicked, entered):  # events of their own, so that what the API gives is plain values
        drawn.success(lambda: gr.Gallery(selected_index=0), None, results.gallery, **_HIDDEN)
        drawn.then(lambda kept: [gr.update(interactive=bool(kept))] * 3, results.history, buttons, **_HIDDEN)


def _wire_stop(engine: Engine, stop: Any, shown: Any) -> None:
    def halt(request: gr.Request) -> Any:
        stopped = engine.cancel(request.session_hash or "", _arrival_of(request))
        return gr.skip() if stopped else '<p class="hint">Nothing is being drawn.</p>'

    stop.click(halt, None, shown, api_name="stop", queue=False, show_progress="hidden")


async def _progress_of(engine: Engine, values: list[Any], request: gr.Request) -> AsyncIterator[Progress]:
    """Submit a request and follow it; news that came too fast are skipped. A client that leaves cancels it.

    What is refused has failed, like what breaks while it is drawn.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Queue[Progress]()

    def tell(progress: Progress) -> None:
        with contextlib.suppress(RuntimeError):  # the server has closed
            loop.call_soon_threadsafe(news.put_nowait, progress)

    session, arrival = request.session_hash or "", _arrival_of(request)
    try:
        asked = await asyncio.to_thread(asked_from, values)  # a large upload takes a second to decode
        job = engine.submit(asked, user_of(request), session, tell, arrival)
    except PixArtError as error:
        yield Progress("failed", message=sentence(error))
        return
    try:
        while True:
            progress = await news.get()
            while not news.empty() and progress.stage not in FINAL:
                progress = news.get_nowait()
            yield progress
            if progress.stage in FINAL:
                return
    finally:
        engine.stop(job)


def user_of(request: gr.Request) -> str:
    """Who shares the queue: the name of a login, else the address."""
    client = getattr(request, "client", None)
    return request.username or (client.host if client is not None else "unknown")


def _arrival_of(request: gr.Request) -> float:
    """When the request came in, by `server.Gate`, in seconds of time.monotonic: before it waited for anything."""
    scope = getattr(request.request, "scope", {})
    return float(scope.get("arrival", time.monotonic()))


@contextlib.contextmanager
def _as_page_error() -> Any:
    """What a user can mend becomes a message on the page."""
    try:
        yield
    except PixArtError as error:
        raise page_error(error) from None


def _shown(paths: list[str], text: Any, *, seed: Any) -> list[Any]:
    """Gallery, seed, stage, history, selected, recipe, download."""
    gallery = [(path, caption_of(path)) for path in paths]
    return [gallery, seed, text, paths, 0, recipe_table(read_recipe(paths[0])), paths[0]]


def caption_of(path: str) -> str:
    """The prompt and the seed of a picture that was drawn here."""
    try:
        recipe = read_recipe(path)
    except PixArtError:
        return ""  # it had to make room for newer ones
    prompt = recipe.get("asked", {}).get("prompt", "")
    return f"{prompt[:60]}{'...' if len(prompt) > 60 else ''} (seed {recipe['seed']})"


def _wire_results(engine: Engine, controls: Controls, results: _Results) -> None:
    limits, loras = engine.settings.limits, engine.artist.loras
    modes = [value for _, value in controls.mode.choices]

    def recipe_at(history: list[str], index: int) -> dict[str, Any]:
        if not 0 <= index < len(history):
            raise page_error("there is no picture yet; draw one first")
        with _as_page_error():
            return read_recipe(history[index])

    def select(history: list[str], event: gr.SelectData) -> list[Any]:
        index = int(event.index)
        recipe = recipe_at(history, index)
        return [index, recipe_table(recipe), history[index]]

    def reuse(history: list[str], index: int) -> list[Any]:
        with _as_page_error():
            return values_from(recipe_at(history, index), limits, modes, loras.names())

    def begin(history: list[str], index: int) -> list[Any]:
        recipe_at(history, index)
        return ["image", gr.update(value=history[index]), gr.update(visible=True)]

    def reuse_file(recipe: Any) -> list[Any]:
        if recipe is None:
            return [gr.skip()] * len(controls.all())
        with _as_page_error():
            return values_from(recipe, limits, modes, loras.names())

    chosen = [results.history, results.selected]
    results.gallery.select(select, results.history, [results.selected, results.recipe, results.download], **_SPEAKING)
    results.reuse.click(reuse, chosen, controls.all(), **_SPEAKING)
    results.begin.click(begin, chosen, [controls.mode, controls.image, results.stage], **_SPEAKING)
    results.upload.upload(reuse_file, results.upload, controls.all(), **_SPEAKING)


def _wire_edges(engine: Engine, controls: Controls, edges: Any) -> None:
    def show(image: Any, width: Any, height: Any) -> Any:
        if image is None:
            return None
        with _as_page_error():
            return engine.edges(decoded(image), int(height) // 16 * 16, int(width) // 16 * 16)

    controls.control_image.change(
        show, [controls.control_image, controls.width, controls.height], edges, api_visibility="private",
        show_progress="minimal", concurrency_limit=1,
    )  # fmt: skip


def _leave(engine: Engine) -> Any:
    def leave(request: gr.Request) -> None:
        engine.cancel(request.session_hash or "")

    return leave
