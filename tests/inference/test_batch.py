from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from diffusion.errors import CheckpointError, PromptError
from diffusion.inference import PixArtPipeline, batch, read_recipe, save_png
from diffusion.inference.batch import load_pipeline, read_prompts, sample_to_folder, slug

ROOT = Path(__file__).parents[2]


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """scripts/inference.py as a program, in this process: importing torch again would take seconds."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *arguments])
    runpy.run_path(str(ROOT / "scripts/inference.py"), run_name="__main__")


def test_pictures_do_not_depend_on_the_batch_size(pipeline: PixArtPipeline, tmp_path: Path) -> None:
    prompts = ["a cat", "Blue car / near: the house?", "a cat"]
    settings = {"num_inference_steps": 2, "negative_prompt": None}
    runs = [
        sample_to_folder(
            pipeline,
            prompts,
            tmp_path / str(size),
            model="tiny",
            seed=4,
            batch_size=size,
            num_images=2,
            settings=settings,
        )[0]
        for size in (1, 4)
    ]
    names = [path.name for path in runs[0]]
    assert names == [path.name for path in runs[1]]
    assert names[1:4] == ["001-a-cat.png", "002-blue-car-near-the-house.png", "003-blue-car-near-the-house.png"]
    for number, (one, other) in enumerate(zip(*runs)):
        assert read_recipe(one) == read_recipe(other)
        assert read_recipe(one)["seed"] == 4 + number
        difference = ImageChops.difference(Image.open(one), Image.open(other)).getextrema()
        assert max(high for _, high in difference) <= 1
    recipe = read_recipe(runs[0][2])
    assert (recipe["prompt"], recipe["solver"], recipe["steps"], recipe["guidance_scale"]) == (
        prompts[1],
        "dpm-solver",
        2,
        4.5,
    )
    assert (recipe["model"], len(recipe["model_fingerprint"])) == ("tiny", 16)
    assert set(recipe["versions"]) == {"pixart", "torch", "diffusers", "transformers"}


def test_batch_size_zero_is_refused(pipeline: PixArtPipeline, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="batch size 0 must be at least 1"):
        sample_to_folder(pipeline, ["a cat"], tmp_path, model="tiny", batch_size=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b" \n\n", "holds no prompts"), (b"caf\xe9", "is not UTF-8")],
)
def test_prompt_files_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read_prompts(path)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  猫  \n".encode())
    assert read_prompts(path) == ["a cat", "猫"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("A  Cat!", "a-cat"),
        ("???", "prompt"),
        ("", "prompt"),
        ("猫 と 犬", "猫-と-犬"),
        ("x" * 500, "x" * 60),
    ],
)
def test_slugs_are_safe_file_names(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_long_slugs_end_at_a_word() -> None:
    assert slug("abcdefghi " * 20) == "-".join(["abcdefghi"] * 6)


def test_missing_model_has_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a pipeline folder, a checkpoint-N, a weight"):
        load_pipeline(tmp_path / "gone", tmp_path)


def test_the_script_draws_from_a_checkpoint_with_parts_of_another_folder(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "transformer").symlink_to(pipeline_folder / "transformer")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    folders = ["--model_path", str(checkpoint), "--pipeline_load_from", str(pipeline_folder)]
    options = ["--txt_file", str(tmp_path / "prompts.txt"), "--step", "2", "--sampling_algo", "sa-solver", "--bs", "2"]
    target = ["--output", str(tmp_path / "out"), "--grid", "--device", "cpu", "--seed", "7"]
    run_script(monkeypatch, *folders, *options, *target)
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000-a-cat.png", "001-a-dog.png", "grid.png"]
    recipe = read_recipe(tmp_path / "out" / "001-a-dog.png")
    assert (recipe["seed"], recipe["solver"], recipe["model"]) == (8, "sa-solver", str(checkpoint))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a cat", "--sampling_algo", "dpm"], "error: algorithm='dpm' is unknown"),
        (["--txt_file", "gone.txt"], "error: prompt file gone.txt cannot be read"),
        (["--prompt", "a cat", "--device", "cuda:99"], "error: --device cuda:99 cannot be used"),
        (["--prompt", "a cat", "--model_path", "gone"], "error: model_path gone does not exist"),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_script(monkeypatch, *arguments)
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.out) == (2, "")
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['inference.py', '--help']\n"
        "try: runpy.run_path('scripts/inference.py', run_name='__main__')\n"
        "except SystemExit as error: assert error.code == 0\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_an_interrupted_call_goes_on_and_other_settings_draw_anew(
    pipeline: PixArtPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a cat", "a car", "a dog"]
    drawn: list[str] = []

    def counted(image: Image.Image, path: Path, recipe: dict[str, Any]) -> Path:
        if "prompt" in recipe:  # the grid has prompts
            drawn.append(recipe["prompt"])
        return save_png(image, path, recipe)

    monkeypatch.setattr(batch, "save_png", counted)

    def sample(**settings: object) -> list[Path]:
        options = {"num_inference_steps": 2, **settings}
        return sample_to_folder(pipeline, prompts, tmp_path, model="tiny", grid=True, settings=options)[0]

    first = sample()
    stamps = [path.stat().st_mtime_ns for path in first]
    first[1].write_bytes(first[1].read_bytes()[:50])  # cut off while it was copied
    drawn.clear()
    again = sample()
    assert drawn == ["a car"]
    assert again[1].name == "001-a-car-2.png"
    assert [path.stat().st_mtime_ns for path in (again[0], again[2])] == [stamps[0], stamps[2]]
    for other in ({"height": 48, "width": 48}, {"negative_prompt": "grey"}, {"guidance_scale": 2.0}):
        drawn.clear()
        assert set(sample(**other)).isdisjoint(first)
        assert drawn == prompts
    drawn.clear()
    assert sample() == again
    assert drawn == []
    assert len(list(tmp_path.glob("grid*.png"))) == 5  # the mended one has another picture name
