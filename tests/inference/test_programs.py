"""The programs in scripts/, in this process, on tiny models."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from diffusion.checkpoints import open_checkpoint
from diffusion.checkpoints.conversion import write_native
from diffusion.config.sampling_cli import sampling_parser
from diffusion.devices import choose_dtype
from diffusion.errors import PromptError
from diffusion.inference import PixArtPipeline, read_recipe
from diffusion.inference.program import explained_memory

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


def test_the_flags_of_the_original_are_kept() -> None:
    shared = (
        "--image_size --t5_path --tokenizer_path --txt_file --model_path --bs --cfg_scale --seed --dataset --save_name"
    )
    for flags, lcm in ((f"{shared} --sampling_algo --step", False), (f"{shared} --sample_steps", True)):
        given = [part for flag in flags.split() for part in (flag, "1")]
        assert vars(sampling_parser("", lcm=lcm).parse_args(given))["t5_path"] == "1"
    defaults = sampling_parser("").parse_args([])
    assert (defaults.bs, defaults.seed, defaults.step, defaults.dataset) == (1, 0, -1, "custom")
    assert (defaults.txt_file, defaults.sampling_algo) == ("asset/samples.txt", "dpm-solver")
    assert sampling_parser("", lcm=True).parse_args([]).sample_steps == 4


@pytest.mark.parametrize("plan", ["auto", "full", "8gb", "4gb"])
def test_every_plan_draws_and_says_what_it_is(
    plan: str, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--model_path", str(pipeline_folder), "--prompt", "a cat", "--step", "2", "--device", "cpu"]
    run(monkeypatch, "inference.py", *arguments, "--memory", plan, "--output", str(tmp_path))
    chosen = "full" if plan == "auto" else plan
    assert f"memory plan {chosen} (T5 " in caplog.text and "expected peak 0.0 GB" in caplog.text
    (path,) = tmp_path.iterdir()
    assert read_recipe(path)["memory"] == chosen


def test_fast_and_lossy(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--model_path", str(pipeline_folder), "--prompt", "a cat", "--step", "4", "--device", "cpu"]
    run(monkeypatch, "inference.py", *arguments, "--fast", "--fp8", "--reuse_every", "2", "--output", str(tmp_path))
    (path,) = tmp_path.iterdir()
    assert read_recipe(path)["fast"] == {"fp8": True, "reuse_every": 2}
    assert "no FP8 products on cpu; they are emulated" in caplog.text


@pytest.mark.parametrize("steps", ["1", "4", "8"])
def test_lcm(steps: str, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["--prompt", "a cat", "--prompt", "a dog", "--prompt", "a cow", "--bs", "2"]
    arguments = ["--model_path", str(pipeline_folder), "--sample_steps", steps, "--device", "cpu"]
    run(monkeypatch, "inference_lcm.py", *arguments, *prompts, "--output", str(tmp_path))
    recipes = [read_recipe(path) for path in sorted(tmp_path.iterdir())]
    assert [(r["solver"], r["steps"], r["guidance_scale"]) for r in recipes] == [("lcm", int(steps), 1.0)] * 3


@pytest.mark.parametrize(
    ("name", "script", "options"),
    [
        ("native.pth", "inference.py", ["--step", "1", "--memory", "8gb"]),
        ("native.safetensors", "inference.py", ["--step", "2", "--sampling_algo", "sa-solver", "--memory", "4gb"]),
        ("PixArt-LCM.pth", "inference_lcm.py", ["--sample_steps", "1"]),
    ],
)
def test_native_files_draw_with_the_parts_of_a_folder(
    name: str, script: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = ROOT / "output/pretrained_models/emoji-256"
    opened = open_checkpoint(bundled)
    if name.endswith(".pth"):  # which the original's readers take for a predictor of noise
        config = replace(opened.found.config, prediction_type="epsilon")
        opened = replace(opened, found=replace(opened.found, config=config))
    model = write_native(opened, tmp_path / name)
    arguments = ["--model_path", str(model), "--prompt", "red apple", "--image_size", "64", "--device", "cpu"]
    run(monkeypatch, script, *arguments, *options, "--output", str(tmp_path / "out"))
    (path,) = (tmp_path / "out").iterdir()
    recipe = read_recipe(path)
    assert recipe["clean_caption"] is True, "as the original does with its files"
    assert Image.open(path).size == (64, 64)


def test_8_bits(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cat.png"
    arguments = ["--model_path", str(pipeline_folder), "--step", "2", "--output", str(output), "--device", "cpu"]
    run(monkeypatch, "infer_pixart_8_bits.py", *arguments)
    assert Image.open(output).size == (64, 64)
    assert read_recipe(output)["memory"] == "8gb"
    assert capsys.readouterr().out.endswith(f"picture: {output}\n")
    with pytest.raises(SystemExit):  # before any model is looked for
        run(monkeypatch, "infer_pixart_8_bits.py", "--model_path", str(tmp_path / "none"), "--step", "0")
    assert "num_inference_steps=0 must be an integer in 1..1000" in capsys.readouterr().err


def test_8_bits_reads_the_size_in_the_prompt(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: list[dict[str, object]] = []

    def draw(pipeline: PixArtPipeline, prompt: str, **settings: object) -> None:
        sizes.append({"prompt": prompt, **settings})
        raise PromptError("enough")

    monkeypatch.setattr(PixArtPipeline, "__call__", draw)
    arguments = ["--model_path", str(pipeline_folder), "--step", "2", "--seed", "7", "--device", "cpu"]
    for directive in ("--hw 96:64", "--hw 96"):
        with pytest.raises(SystemExit):
            run(monkeypatch, "infer_pixart_8_bits.py", *arguments, "--prompt", f"a cat {directive}")
    assert sizes == [
        {
            "prompt": "a cat",
            "num_inference_steps": 2,
            "seed": 7,
            "height": 96,
            "width": 64,
            "use_resolution_binning": True,
        }
    ]
    assert "--hw 96 must be height:width" in capsys.readouterr().err


def test_style_directive_and_preview(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[str, tuple[int, int]]] = []
    save = Image.Image.save

    def watched(self: Image.Image, target: object, *arguments: object, **options: object) -> None:
        saved.append((Path(str(getattr(target, "name", target))).name, self.size))
        save(self, target, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", watched)
    arguments = ["--model_path", str(pipeline_folder), "--prompt", "a cat", "--step", "4", "--device", "cpu"]
    options = ["--style", "Cinematic", "--negative_prompt", "dog", "--preview", "2", "--clean_caption"]
    run(monkeypatch, "inference.py", *arguments, *options, "--output", str(tmp_path))
    assert [entry for entry in saved if entry[0] == "preview.png"] == [("preview.png", (8, 8))] * 2
    (path,) = tmp_path.iterdir()  # the preview is gone
    recipe = read_recipe(path)
    assert recipe["prompt"].startswith("still from a film, a cat") and recipe["clean_caption"] is True
    assert recipe["negative_prompt"].startswith("dog, cartoon")


@pytest.mark.parametrize("kind", ["folder", "native"])
def test_a_size_far_from_training_is_drawn_and_said(
    kind: str, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native = write_native(open_checkpoint(pipeline_folder), tmp_path / "native.safetensors")
    model = pipeline_folder if kind == "folder" else native
    arguments = ["--model_path", str(model), "--pipeline_load_from", str(pipeline_folder), "--device", "cpu"]
    for size, said in (("64", False), ("128", True)):
        caplog.clear()
        options = ["--prompt", "a cat", "--step", "1", "--image_size", size, "--output", str(tmp_path / size)]
        run(monkeypatch, "inference.py", *arguments, *options)
        (path,) = (tmp_path / size).iterdir()
        assert Image.open(path).size == (int(size), int(size))
        warning = "128x128 px has 4 times the area that this model was trained on (64 px)"
        assert (warning in caplog.text and "give no size to draw its own" in caplog.text) is said


DIRTY = "red apple (http://example.com/a) #1234567 & <b>cat</b>"


@pytest.mark.parametrize(
    ("kind", "flags", "reached"),
    [
        ("native", [], "red apple cat"),  # the original cleaned prompts twice
        ("native", ["--no-clean_caption"], DIRTY),
        ("folder", [], DIRTY),
        ("folder", ["--clean_caption"], "red apple cat"),
    ],
)
def test_clean_caption_decides_which_text_reaches_the_tokenizer(
    kind: str, flags: list[str], reached: str, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = write_native(open_checkpoint(pipeline_folder), tmp_path / "native.safetensors")
    texts: list[str] = []
    tokenize = PreTrainedTokenizerBase.__call__

    def watched(self: PreTrainedTokenizerBase, text: list[str], **options: Any) -> Any:
        texts.extend(text)
        return tokenize(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", watched)
    model = pipeline_folder if kind == "folder" else native
    arguments = ["--model_path", str(model), "--pipeline_load_from", str(pipeline_folder), "--device", "cpu"]
    options = ["--prompt", DIRTY, "--step", "1", *flags, "--output", str(tmp_path / "out")]
    run(monkeypatch, "inference.py", *arguments, *options)
    assert [text for text in texts if text] == [reached]  # and "" for the null caption
    (path,) = (tmp_path / "out").iterdir()
    assert read_recipe(path).get("clean_caption", False) is (reached != DIRTY)


@pytest.mark.parametrize("script", ["inference.py", "inference_lcm.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bs", "0"], "--bs 0 must be at least 1"),
        (["--bs", "-2"], "--bs -2 must be at least 1"),
        (["--bs", "two"], "argument --bs: invalid int value: 'two'"),
        (["--num_images", "0"], "--num_images 0 must be at least 1"),
        (["--preview", "0"], "--preview 0 must be at least 1"),
        (["--prompt", "a dog --ar 9"], "--ar 9 must be height:width, as in --ar 9:16 (prompt 'a dog')"),
        (["--prompt", "a dog --hw 0:64"], "--hw 0:64 must be height:width, as in --hw 9:16 (prompt 'a dog')"),
        (["--prompt", "a dog --hw 64:9000"], "--hw 64:9000 must be two whole numbers of px, at most 8192"),
        (["--lora_scale", "2"], "--lora_scale is given without --lora"),
        (["--fp8"], "--fp8 is given without --fast; add it"),
        (["--cfg_scale", "nan"], "guidance_scale=nan must be a finite number"),
        (["--cfg_scale", "-1"], "guidance_scale=-1.0 must be a finite number >= 0"),
        (["--fast", "--guidance_until", "2"], "guidance_until=2.0 must lie in 0..1"),
        (["--fast", "--reuse_every", "0"], "reuse_every=0 must be an integer of at least 1"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    script: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*places: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("diffusion.inference.program.load_pipeline", load)
    base = ["--prompt", "a cat", "--device", "cpu", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, script, *base, *arguments)
    error = capsys.readouterr().err
    assert (exit_info.value.code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {message}")


def test_a_directive_in_a_prompt_file_is_read_before_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --ar 1:1\na dog --hw 64\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, "inference.py", "--txt_file", str(tmp_path / "prompts.txt"), "--model_path", "gone")
    assert capsys.readouterr().err.startswith("error: --hw 64 must be height:width")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_size", "0"], "error: height=0 must be a positive multiple of 16 px"),
        (["--height", "65"], "error: height=65 must be a positive multiple of 16 px"),
        (["--width", "100000"], "error: width=100000 must be at most 8192 px"),
        (["--memory", "6gb"], "error: memory='6gb' is unknown; did you mean '8gb'"),
        (["--style", "Cinema"], "error: style='Cinema' is unknown; did you mean 'Cinematic'"),
        (["--image", "gone.png"], "error: gone.png"),
        (["--strength", "0.5"], "error: --strength is given without --image"),
        (["--binning"], "error: use_resolution_binning has no sizes for a model of 64 px"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["--model_path", str(pipeline_folder), "--prompt", "a cat", "--device", "cpu", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, "inference.py", *base, *arguments)
    error = capsys.readouterr().err
    assert (exit_info.value.code, error.count("\n")) == (2, 1)
    assert error.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_names_what_helps() -> None:
    message = "too little memory for --memory full; use --memory 4gb, a smaller --bs"
    with pytest.raises(PromptError, match=message), explained_memory("full"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cuda", (9, 0), torch.bfloat16),  # H100
        ("cuda", (8, 0), torch.bfloat16),  # A100
        ("cuda", (7, 5), torch.float16),  # T4
        ("cuda", (7, 0), torch.float16),  # V100
        ("mps", (0, 0), torch.float32),
        ("cpu", (0, 0), torch.float32),
    ],
)
def test_precision_follows_the_card(
    device: str, capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card: Any = SimpleNamespace(type=device)
    assert choose_dtype("auto", card) == expected
    few_steps = torch.float16 if device == "cuda" else torch.float32  # an LCM's first step magnifies rounding 157 times
    assert choose_dtype("auto", card, few_steps=True) == few_steps
    assert choose_dtype("bfloat16", card, few_steps=True) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
