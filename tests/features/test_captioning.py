from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from diffusion.config.captioning_cli import captioning_parser
from diffusion.errors import CheckpointError, ConfigError, DataError, PixArtError
from diffusion.features.captioner import Captioner, _KeyedGumbel
from diffusion.features.captioning import CaptioningSettings
from diffusion.features.captioning_cli import run_captioning
from diffusion.features.captioning_index import CaptionTask, read_caption_index
from diffusion.features.sources import PictureFile, open_source
from tests.features.tiny_llava import write_tiny_llava

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("llava"))


def pictures(root: Path, count: int) -> list[dict[str, object]]:
    """`count` pictures in two folders, and their index; every third has no caption."""
    rng = np.random.default_rng(0)
    items: list[dict[str, object]] = []
    for number in range(count):
        path = f"{'ab'[number % 2]}/{number:02d}.png"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(root / path)
        items.append({"path": path, "height": 40, "width": 32, "prompt": "a cat " * (number % 3)})
    (root / "index.json").write_text(json.dumps(items))
    return items


def typed(root: Path, output: Path, model: Path, *arguments: object) -> str:
    """What the program does with these arguments, in this process."""
    given = ["--data-root", root, "--output", output, "--model-path", model, "--device", "cpu"]
    given += ["--max-new-tokens", 6, "--batch-size", 4, *arguments]
    return run_captioning(captioning_parser(None).parse_args([str(argument) for argument in given]))


def texts(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*.txt")}


def test_every_picture_gets_a_text_and_the_list_can_be_extracted(tmp_path: Path, model: Path) -> None:
    items = pictures(tmp_path / "data", 7)
    line = typed(tmp_path / "data", tmp_path / "out", model, "--index", "index.json")
    assert "7 captions (7 new); 0 rejected" in line
    assert sorted(texts(tmp_path / "out")) == sorted(str(item["path"]).replace(".png", ".txt") for item in items)
    listed = json.loads((tmp_path / "out/captions.json").read_text())
    assert [item["path"] for item in listed] == [item["path"] for item in items]
    for item in listed:
        text = (tmp_path / "out" / item["path"]).with_suffix(".txt").read_text(encoding="utf-8")
        assert text.strip() == item["prompt"]
    assert listed[2]["original_prompt"] == "a cat a cat"
    assert "original_prompt" not in listed[3]
    assert len({item["prompt"] for item in listed}) == 7  # the model looks at the pictures
    source = open_source(tmp_path / "out/captions.json", dataset_root=tmp_path / "data")
    assert len(source.samples) == 7 and not source.rejected


def test_a_caption_is_what_transformers_alone_gives(tmp_path: Path, model: Path) -> None:
    items = pictures(tmp_path / "data", 5)
    typed(tmp_path / "data", tmp_path / "out", model, "--index", "index.json", "--temperature", 0)
    processor, network = AutoProcessor.from_pretrained(model), LlavaForConditionalGeneration.from_pretrained(model)
    for item in (items[0], items[2]):
        told = "Describe this image and its style in a very detailed manner."
        if item["prompt"]:
            told = (
                "The caption of this image is: a cat a cat\nKeep what it says, and describe the image and its style in "
                "a very detailed manner."
            )
        image = Image.open(tmp_path / "data" / str(item["path"]))
        inputs = processor(images=image, text=f"USER: <image>\n{told} ASSISTANT:", return_tensors="pt")
        tokens = network.generate(**inputs, do_sample=False, max_new_tokens=6)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        written = (tmp_path / "out" / str(item["path"])).with_suffix(".txt").read_text(encoding="utf-8")
        assert written.split() == expected.split()


def test_it_goes_on_where_it_stopped_to_the_same_captions(tmp_path: Path, model: Path) -> None:
    pictures(tmp_path / "data", 9)
    typed(tmp_path / "data", tmp_path / "whole", model)
    typed(tmp_path / "data", tmp_path / "cut", model, "--batch-size", 3)
    whole = texts(tmp_path / "whole")
    assert len(whole) == 9
    for name in ("a/02.txt", "b/05.txt", "a/08.txt"):
        (tmp_path / "cut" / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.txt")}
    assert "9 captions (3 new)" in typed(tmp_path / "data", tmp_path / "cut", model, "--batch-size", 1)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert texts(tmp_path / "cut") == whole


def test_other_settings_and_foreign_texts_are_refused(tmp_path: Path, model: Path) -> None:
    pictures(tmp_path / "data", 2)
    typed(tmp_path / "data", tmp_path / "out", model)
    before = texts(tmp_path / "out")
    with pytest.raises(DataError, match=r"made otherwise: seed \(0, now 1\); choose another --output"):
        typed(tmp_path / "data", tmp_path / "out", model, "--seed", 1)
    (tmp_path / "data/a/00.txt").write_text("mine")
    with pytest.raises(DataError, match=r"1 texts that this program did not write, the first 'a/00\.txt'"):
        typed(tmp_path / "data", tmp_path / "data", model)
    assert (tmp_path / "data/a/00.txt").read_text() == "mine"
    assert texts(tmp_path / "out") == before


def test_a_model_that_cannot_be_had_is_told_at_once_and_claims_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "data", 2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = r"nobody/nothing is no file .* could not be reached for files of an image-text model"
    with pytest.raises(CheckpointError, match=message):
        typed(tmp_path / "data", tmp_path / "out", Path("nobody/nothing"))
    assert "2 captions (2 new)" in typed(tmp_path / "data", tmp_path / "out", model)


def test_bad_pictures_are_listed_and_the_others_captioned(tmp_path: Path, model: Path) -> None:
    items = pictures(tmp_path / "data", 6)
    data = tmp_path / "data"
    (data / "a/00.png").write_bytes(b"")
    (data / "a/02.png").write_bytes((data / "a/02.png").read_bytes()[:60])
    Image.new("L", (20000, 1)).save(data / "a/04.png")
    Image.new("CMYK", (40, 40)).save(data / "a/cmyk.jpg")
    (data / "a/folder.jpg").mkdir()
    extra = ["a/cmyk.jpg", "a/gone.png", "../x.png", "/etc/passwd", "a/\0.png", "b/01", ".", "", 3, None, ["x"], {}]
    extra += [{"path": "b/03.png", "prompt": 3}, {"path": "a/folder.jpg"}, "a" * 5000]
    (data / "index.json").write_text(json.dumps([*items, *extra]))
    with pytest.raises(DataError, match=r"pictures cannot be used.*--max-rejected"):
        typed(data, tmp_path / "out", model, "--index", "index.json")
    line = typed(data, tmp_path / "out", model, "--index", "index.json", "--max-rejected", 1)
    assert "4 captions" in line and "17 rejected" in line
    assert sorted(texts(tmp_path / "out")) == ["a/cmyk.txt", "b/01.txt", "b/03.txt", "b/05.txt"]
    rejected = [json.loads(row) for row in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    reasons = " | ".join(row["reason"] for row in rejected)
    expected = ("is empty", "20000x1 px is beyond 16 to 1", "gone.png' does not exist", "leaves", "is listed twice")
    assert [reason for reason in expected if reason not in reasons] == []
    assert all("\n" not in row["reason"] for row in rejected)


def test_indexes(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    (tmp_path / "a/00.txt").write_text("an apple ")
    (tmp_path / "list.txt").write_text("b/01\n\na/02.png\n")
    by_list, by_folder = read_caption_index(tmp_path, tmp_path / "list.txt")[0], read_caption_index(tmp_path, None)[0]
    assert [task.key for task in by_list] == ["b/01.png", "a/02.png"]
    assert [(task.key, task.original) for task in by_folder][:2] == [("a/00.png", "an apple"), ("a/02.png", "")]
    Image.new("RGB", (8, 8)).save(tmp_path / "a/00.jpg")
    _, rejected = read_caption_index(tmp_path, None)
    assert "'a/00.png' and 'a/00.jpg' share one name; both captions would be a/00.txt" in rejected[0].reason
    (tmp_path / "broken.json").write_text('[\n{"path": "a/00.png"},\n{"path"')
    with pytest.raises(DataError, match=r"broken\.json line 3 is not JSON"):
        read_caption_index(tmp_path, tmp_path / "broken.json")
    with pytest.raises(DataError, match="no such file"):
        read_caption_index(tmp_path, Path("nowhere.json"))
    with pytest.raises(DataError, match="no such folder"):
        read_caption_index(tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not one picture to caption"):
        read_caption_index(tmp_path / "empty", None)


def test_prompts() -> None:
    plain, captioned = (CaptionTask("a.png", PictureFile(Path("a.png")), text) for text in ("", "a {caption} cat"))
    auto = CaptioningSettings("m")
    assert auto.instruction_for(plain) == "Describe this image and its style in a very detailed manner."
    assert "is: a {caption} cat\n" in auto.instruction_for(captioned)
    assert CaptioningSettings("m", "describe").instruction_for(captioned) == auto.instruction_for(plain)
    assert CaptioningSettings("m", instruction="More on {caption}!").instruction_for(captioned).endswith("cat!")
    with pytest.raises(DataError, match=r"a\.png has no caption to refine; use --prompt auto or describe"):
        CaptioningSettings("m", "refine").instruction_for(plain)


def test_models_without_a_chat_template_need_a_form(tmp_path: Path) -> None:
    pictures(tmp_path / "data", 2)
    model = write_tiny_llava(tmp_path / "llava", chat_template=False)
    with pytest.raises(ConfigError, match="llava has no chat template; give its form with --template"):
        typed(tmp_path / "data", tmp_path / "out", model)
    form = ["--template", "USER: <image>\n{instruction} ASSISTANT:"]
    assert "2 captions" in typed(tmp_path / "data", tmp_path / "b", model, *form)


@pytest.mark.parametrize("kind", ["nowhere", "empty", "another kind", "without weights"])
def test_a_model_that_is_none_is_one_line(tmp_path: Path, model: Path, kind: str) -> None:
    pictures(tmp_path / "data", 1)
    folder = tmp_path / "model"
    if kind != "nowhere":
        folder.mkdir()
    if kind == "another kind":
        (folder / "config.json").write_text('{"model_type": "llava_mpt"}')
    if kind == "without weights":
        for path in model.iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"--model-path .*llava-hf/llava-1\.5-7b-hf") as caught:
        typed(tmp_path / "data", tmp_path / "out", folder)
    assert "\n" not in str(caught.value)


def test_sampling_draws_from_the_softmax_of_the_scores() -> None:
    scores, count = torch.tensor([1.0, 0.0, -1.0, 0.5]), 4000
    gumbel = _KeyedGumbel([str(number) for number in range(count)], 0, 0.5, torch.device("cpu"))
    drawn = gumbel(torch.empty(0), scores.expand(count, 4)).argmax(-1)
    frequencies = torch.bincount(drawn, minlength=4) / count
    # Standard error at most 0.008: five of them.
    torch.testing.assert_close(frequencies, (scores / 0.5).softmax(-1), atol=0.04, rtol=0)


def test_captions_without_an_end_are_kept_and_counted(model: Path) -> None:
    captioner = Captioner.from_pretrained(str(model), max_new_tokens=3)
    image = Image.new("RGB", (28, 28), "red")
    ((text, ended),) = captioner([image], ["describe"], ["a"])
    assert text and not ended
    captioner.model.generation_config.eos_token_id = list(range(320))
    ((_, ended),) = captioner([image], ["describe"], ["a"])
    assert ended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", 0], "--batch-size 0 must be at least 1"),
        (["--temperature", -1], "--temperature -1.0 must be at least 0"),
        (["--temperature", "nan"], "must be at least 0"),
        (["--instruction", "x", "--prompt", "refine"], "give one of them"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: list[object], message: str) -> None:
    with pytest.raises(PixArtError, match=message):
        typed(tmp_path, tmp_path / "out", tmp_path, *arguments)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path, model: Path) -> None:
    pictures(tmp_path / "data", 9)
    (tmp_path / "data/a/02.png").write_bytes(b"broken")
    assert "8 captions (8 new); 1 rejected" in typed(tmp_path / "data", tmp_path / "one", model)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools/VLM_caption_lightning.py"), "--output", str(tmp_path / "two"), "--device", "cpu"]
    command += ["--data-root", str(tmp_path / "data"), "--model-path", str(model), "--max-new-tokens", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 captions (8 new); 1 rejected" in done.stdout
    assert texts(tmp_path / "two") == texts(tmp_path / "one")
    for name in ("captions.json", "rejected.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
