"""The inputs of the drawing page, and how they become a request and come back from a recipe."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import gradio as gr

from diffusion.errors import PromptError
from diffusion.inference.solvers import DEFAULT_STEPS
from diffusion.inference.styles import NO_STYLE, STYLES
from diffusion.web.asking import MODES, Asked, check, whole_number
from diffusion.web.models import Variant
from diffusion.web.settings import MAX_SEED, Limits
from diffusion.web.uploads import MaskEditor, PictureInput, decoded, decoded_mask

SOLVERS = {
    "DPM-Solver++": "dpm-solver",
    "SA-Solver": "sa-solver",
    "DEIS": "deis",
    "DDIM": "ddim",
    "IDDPM": "iddpm",
    "LCM": "lcm",
}
RATIOS = {"1:1": (1, 1), "4:3": (3, 4), "3:2": (2, 3), "16:9": (9, 16), "3:4": (4, 3), "2:3": (3, 2), "9:16": (16, 9)}
NO_LORA = "(none)"
STAY = ("image", "mask", "painted", "control_image")  # pictures, which no recipe holds
# Steps and guidance (None = the model's usual one) of the original's demos, where they had the solver.
USUAL: dict[str, tuple[int, float | None]] = {name: (steps, None) for name, steps in DEFAULT_STEPS.items()} | {
    "dpm-solver": (14, None),
    "sa-solver": (25, 3.0),
    "lcm": (4, 1.0),
}


@dataclass
class Controls:
    """The components, in the order in which the function of the page takes their values."""

    prompt: Any
    negative_prompt: Any
    style: Any
    mode: Any
    width: Any
    height: Any
    solver: Any
    steps: Any
    guidance_scale: Any
    seed: Any
    randomise: Any
    pictures: Any
    image: Any
    strength: Any
    painted: Any
    control_image: Any
    control_strength: Any
    lora: Any
    lora_scale: Any

    def all(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


def add_prompt() -> dict[str, Any]:
    """Prompt, negative prompt and style."""
    return {
        "prompt": gr.Textbox(
            label="Prompt",
            placeholder="a red apple",
            lines=2,
            max_lines=6,
            elem_id="prompt",
            info="What to draw. Shift+Enter draws.",
        ),
        "negative_prompt": gr.Textbox(
            value="", label="Negative prompt", lines=1, max_lines=4, elem_id="negative", info="What to lead away from."
        ),
        "style": gr.Dropdown(list(STYLES), value=NO_STYLE, label="Style", elem_id="style"),
    }


def add_beginning(variant: Variant, *, has_controlnet: bool) -> dict[str, Any]:
    """What the picture begins from: words alone, a picture, a part of one, or edges."""
    offered = {label: name for name, label in MODES.items() if name != "edges" or has_controlnet}
    mode = gr.Radio(list(offered.items()), value="text", label="Begin from", elem_id="mode")
    with gr.Group(visible=False) as image_group:
        image = PictureInput(
            label="Picture to begin from", sources=["upload", "clipboard"], elem_id="image", height=300
        )
    with gr.Group(visible=False) as paint_group:
        hint = '<p class="hint">Add a picture, choose the brush, paint over the part to redraw.</p>'
        gr.HTML(hint, padding=True, elem_id="paint-hint")
        painted = MaskEditor(
            label="Paint the part to redraw",
            sources=["upload", "clipboard"],
            brush=gr.Brush(default_size=40, colors=["#2563eb"], default_color="#2563eb", color_mode="fixed"),
            layers=False,
            transforms=(),
            elem_id="painted",
            height=420,
        )
    with gr.Group(visible=False) as strength_group:
        strength = gr.Slider(
            0, 1, value=0.6, step=0.05, label="Strength", elem_id="strength", info="0 keeps the picture, 1 ignores it."
        )
    with gr.Group(visible=False) as edges_group:
        control_image = PictureInput(
            label="Picture whose edges are followed", sources=["upload", "clipboard"], elem_id="control", height=300
        )
        edges = gr.Image(
            label="Edges that are followed",
            interactive=False,
            elem_id="edges",
            format="png",
            height=300,
            buttons=["download", "fullscreen"],
        )
        control_strength = gr.Slider(
            0, 2, value=variant.control_strength, step=0.05, label="Condition strength", elem_id="control-strength"
        )

    def show(chosen: str) -> list[Any]:
        return [
            gr.update(visible=chosen == "image"),
            gr.update(visible=chosen == "inpaint"),
            gr.update(visible=chosen in ("image", "inpaint")),
            gr.update(visible=chosen == "edges"),
            gr.update(value=1.0 if chosen == "inpaint" else 0.6),
        ]

    groups = [image_group, paint_group, strength_group, edges_group, strength]
    mode.input(show, mode, groups, queue=False, show_progress="hidden", api_visibility="private")
    mode.change(lambda chosen: show(chosen)[:4], mode, groups[:4], queue=False, show_progress="hidden",
                api_visibility="private")  # fmt: skip
    return {
        "mode": mode,
        "image": image,
        "painted": painted,
        "strength": strength,
        "control_image": control_image,
        "control_strength": control_strength,
        "edges": edges,
    }


def add_numbers(
    variant: Variant, limits: Limits, size: int, size_for: Any, loras: list[str], usual_guidance: float
) -> dict[str, Any]:
    """Size, solver, steps, guidance, seed, number of pictures, LoRA.

    size_for: (height, width) in px of the model's trained size nearest to a ratio. usual_guidance: the model's.
    """

    def usual(scale: float | None) -> float:
        return usual_guidance if scale is None else scale

    with gr.Row():
        pictures = gr.Slider(
            1, limits.max_pictures, value=variant.pictures, step=1, label="Pictures", elem_id="pictures"
        )
        ratio = gr.Dropdown(list(RATIOS), value="1:1", label="Ratio", info="width:height", elem_id="ratio")
    with gr.Row():
        width = gr.Slider(64, limits.max_side_px, value=size, step=16, label="Width", elem_id="width")
        height = gr.Slider(64, limits.max_side_px, value=size, step=16, label="Height", elem_id="height")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
        randomise = gr.Checkbox(True, label="New seed for each drawing", elem_id="randomise")
    solver = gr.Radio(list(SOLVERS.items()), value=variant.solver, label="Solver", elem_id="solver")
    with gr.Row():
        steps = gr.Slider(1, limits.max_steps, value=variant.steps, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(
            1, limits.max_guidance, value=usual(variant.guidance_scale), step=0.1, label="Guidance", elem_id="guidance"
        )
    with gr.Row(visible=bool(loras)):
        lora = gr.Dropdown([NO_LORA, *loras], value=NO_LORA, label="LoRA", elem_id="lora")
        lora_scale = gr.Slider(0, 2, value=1, step=0.05, label="LoRA strength", elem_id="lora-strength")

    def resize(chosen: str) -> tuple[int, int]:
        tall, wide = size_for(*RATIOS[chosen])
        return wide, tall

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    ratio.input(resize, ratio, [width, height], **quiet)
    solver.input(lambda chosen: (USUAL[chosen][0], usual(USUAL[chosen][1])), solver, [steps, guidance], **quiet)
    return {
        "pictures": pictures,
        "width": width,
        "height": height,
        "seed": seed,
        "randomise": randomise,
        "solver": solver,
        "steps": steps,
        "guidance_scale": guidance,
        "lora": lora,
        "lora_scale": lora_scale,
    }


def asked_from(values: list[Any]) -> Asked:
    """The request of the values of `Controls.all()`; what is wrong with them is said by `check`.

    Raises:
        PromptError: an uploaded picture that cannot be used.
    """
    given = dict(zip((field.name for field in fields(Controls)), values))
    if given.pop("randomise"):
        given["seed"] = random.randint(0, MAX_SEED)
    mode, uploaded, painted = given["mode"], given["image"], given.pop("painted")
    followed = given["control_image"]
    # Only what the mode asks for is decoded: a damaged picture in an input out of sight does no harm.
    given["image"] = decoded(uploaded) if mode == "image" and uploaded else None
    given["control_image"] = decoded(followed) if mode == "edges" and followed else None
    if mode == "inpaint" and painted is not None:
        given["image"], given["mask"] = decoded_mask(painted)
    if given["lora"] in (NO_LORA, ""):
        given["lora"] = None
    for name in ("width", "height", "steps", "seed", "pictures"):
        given[name] = whole_number(given[name])
    for name in ("prompt", "negative_prompt"):
        given[name] = "" if given[name] is None else given[name]
    return Asked(**given)


def values_from(recipe: Mapping[str, Any], limits: Limits, modes: list[str], loras: list[str]) -> list[Any]:
    """What `Controls.all()` has to show to draw a picture again: settings of its recipe, whoever wrote it.

    Pictures to begin from are not in a recipe: those inputs stay as they are.

    Raises:
        PromptError: a recipe with settings that are none, or out of this page's range.
    """
    given = recipe.get("asked") or {
        **{
            name: recipe[name]
            for name in ("width", "height", "solver", "steps", "guidance_scale", "seed")
            if name in recipe
        },
        **{name: recipe.get(name) or "" for name in ("prompt", "negative_prompt")},
    }
    known = {field.name for field in fields(Asked)}
    if not isinstance(given, Mapping) or not set(given) <= known - set(STAY):
        raise PromptError("the recipe of this picture holds settings that this page does not know")
    mode = given.get("mode", "text") if given.get("mode") in modes else "text"
    lora = given.get("lora") if given.get("lora") in loras else None
    asked = replace(Asked(**{**given, "mode": "text"}), pictures=1, lora=lora)
    check(asked, limits)
    shown = {**asked.choices(), "mode": mode, "lora": lora or NO_LORA, "randomise": False}
    return [gr.skip() if field.name in STAY else shown[field.name] for field in fields(Controls)]
