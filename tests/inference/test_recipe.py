from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from diffusion.errors import DataError
from diffusion.inference import model_fingerprint, read_recipe, save_png

RECIPE = {"prompt": 'café — 猫 "quoted"\nline', "seed": 7, "solver": "dpm-solver", "steps": 20, "guidance_scale": 4.5}


def test_recipe_round_trip(tmp_path: Path) -> None:
    path = save_png(
        Image.new("RGB", (8, 6), (1, 2, 3)), tmp_path / "new" / "a.png", {**RECIPE, "width": 8, "height": 6}
    )
    assert path == tmp_path / "new" / "a.png"
    assert read_recipe(path) == {**RECIPE, "width": 8, "height": 6}
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (1, 2, 3)
        lines = image.info["parameters"]
    assert lines.startswith(RECIPE["prompt"])
    assert "Steps: 20, Sampler: dpm-solver, CFG scale: 4.5, Seed: 7" in lines.replace("\n", " ")
    assert lines.endswith("Size: 8x6")


def test_nothing_is_overwritten_and_nothing_left_over(tmp_path: Path) -> None:
    paths = [save_png(Image.new("RGB", (4, 4), (n, 0, 0)), tmp_path / "a.png", {"seed": n}) for n in range(3)]
    assert [path.name for path in paths] == ["a.png", "a-2.png", "a-3.png"]
    assert [read_recipe(path)["seed"] for path in paths] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a-3.png", "a.png"]


def test_pictures_of_others_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    for name in ("plain.png", "broken.png", "missing.png"):
        with pytest.raises(DataError, match=f"{name} carries no recipe"):
            read_recipe(tmp_path / name)


def test_fingerprint_knows_weights_not_storage() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).half()
    before = model_fingerprint(layer)
    assert model_fingerprint(layer.float()) == before  # float16 values are exact in float32
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert model_fingerprint(layer) != before
