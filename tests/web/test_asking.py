from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from diffusion.errors import PromptError
from diffusion.web.asking import Asked, check, whole_number
from diffusion.web.controls import Controls, asked_from, values_from
from diffusion.web.settings import MAX_SEED, Limits

LIMITS = Limits(max_side_px=512)
GOOD = Asked("red apple")


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ""}, {"prompt": "x" * 2001}, {"prompt": 7}, {"negative_prompt": "x" * 10**6}, {"style": "Baroque"},
        {"solver": "euler"}, {"solver": ["ddim"]}, {"mode": "magic"}, {"width": 0}, {"width": 528}, {"width": 16.5},
        {"height": math.nan}, {"height": "256"}, {"height": None}, {"steps": 0}, {"steps": 101}, {"steps": True},
        {"seed": -1}, {"seed": MAX_SEED + 1}, {"pictures": 9}, {"guidance_scale": math.inf}, {"guidance_scale": -1},
        {"guidance_scale": 31}, {"strength": 1.1}, {"strength": math.nan}, {"control_strength": 3}, {"lora_scale": "1"},
        {"mode": "image"}, {"mode": "edges"}, {"mode": "inpaint", "image": Image.new("RGB", (8, 8))},
        {"mode": "inpaint", "image": Image.new("RGB", (8, 8)), "mask": Image.new("L", (8, 8))},
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_in_one_short_line(wrong: dict[str, Any]) -> None:
    check(GOOD, LIMITS)
    with pytest.raises(PromptError) as caught:
        check(replace(GOOD, **wrong), LIMITS)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_whole_number() -> None:
    assert whole_number(14.0) == 14 and isinstance(whole_number(14.0), int)
    assert whole_number(14.5) == 14.5 and whole_number("14") == "14"


def test_a_recipe_puts_its_settings_back() -> None:
    asked = replace(GOOD, style="Anime", width=320, solver="ddim", steps=9, guidance_scale=2.5, seed=77, pictures=3)
    names = list(Controls.__dataclass_fields__)
    values = values_from({"asked": asked.choices()}, LIMITS, ["text"], [])
    again = asked_from([*values[: names.index("image")], None, 0.6, None, None, 1.0, "(none)", 1.0])
    assert again == replace(asked, pictures=1)


def test_a_recipe_of_the_command_line_is_understood() -> None:
    recipe = {"prompt": "fox", "negative_prompt": None, "width": 256, "height": 256, "solver": "ddim", "steps": 5,
              "guidance_scale": 4.5, "seed": 3}  # fmt: skip
    values = dict(zip(Controls.__dataclass_fields__, values_from(recipe, LIMITS, ["text"], [])))
    assert (values["prompt"], values["negative_prompt"], values["seed"], values["randomise"]) == ("fox", "", 3, False)


@pytest.mark.parametrize("given", [{"width": 10**9}, {"nonsense": 1}, {"image": "/etc/passwd"}, "text"])
def test_a_recipe_of_a_stranger_is_checked(given: Any) -> None:
    asked = {**GOOD.choices(), **given} if isinstance(given, dict) else given
    with pytest.raises(PromptError):
        values_from({"asked": asked}, LIMITS, ["text"], [])
