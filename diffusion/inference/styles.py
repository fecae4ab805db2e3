"""Styles: a frame of words around a prompt, and what guidance should lead away from."""

from __future__ import annotations

from diffusion.errors import PromptError, did_you_mean

NO_STYLE = "(No style)"
# Name -> (prompt with one slot, negative prompt). The names are those of the original's demos; the wording is ours.
STYLES: dict[str, tuple[str, str]] = {
    NO_STYLE: ("{prompt}", ""),
    "Cinematic": (
        "still from a film, {prompt}, dramatic light, shallow focus, wide screen, film grain, rich colours",
        "cartoon, drawing, flat light, snapshot, overexposed, blurry, distorted",
    ),
    "Photographic": (
        "photograph of {prompt}, 35mm lens, natural light, sharp detail, professional, 4k",
        "painting, drawing, illustration, render, cartoon, plastic skin, blurry",
    ),
    "Anime": (
        "anime picture of {prompt}, key visual, clean lines, vivid colours, studio quality, detailed",
        "photograph, realistic, 3d render, dull colours, rough sketch, distorted",
    ),
    "Manga": (
        "page of a manga showing {prompt}, ink, screen tones, dynamic composition, comic, detailed",
        "photograph, colour, 3d render, blurry, soft shading, distorted",
    ),
    "Digital Art": (
        "digital painting of {prompt}, concept art, matte painting, fine brushwork, highly detailed",
        "photograph, snapshot, amateur, low resolution, distorted",
    ),
    "Pixel art": (
        "pixel art of {prompt}, 8-bit game, few colours, large pixels, low resolution",
        "photograph, smooth gradients, fine detail, blurry, noise",
    ),
    "Fantasy art": (
        "fantasy painting of {prompt}, ethereal, epic scale, glowing light, magical, intricate",
        "photograph, modern, plain, dull, ordinary, distorted",
    ),
    "Neonpunk": (
        "cyberpunk scene of {prompt}, neon light, night, magenta and cyan, glossy, futuristic, detailed",
        "daylight, pastel, painting, plain, faded, distorted",
    ),
    "3D Model": (
        "3d model of {prompt}, octane render, volumetric light, physically based materials, detailed",
        "drawing, sketch, photograph, flat, low polygon count, noise",
    ),
}


def apply_style(name: str, prompt: str, negative_prompt: str | None = None) -> tuple[str, str | None]:
    """Prompt and negative prompt in a style of `STYLES`; one's own negative words come first. "" or None = no words.

    Size directives at the end of the prompt stay at its end. Raises PromptError for an unknown style.
    """
    if name not in STYLES:
        raise PromptError(f"style={name!r} is unknown; {did_you_mean(name, STYLES)}")
    frame, avoided = STYLES[name]
    words, dashes, directives = prompt.partition(" --")
    negative = ", ".join(part for part in (negative_prompt, avoided) if part)
    return frame.format(prompt=words.strip()) + dashes + directives, negative or None
