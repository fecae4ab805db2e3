"""train_pixart_lora_hf.py on a tiny pipeline: flags, data, adapter, resume, mistakes."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion.adapters import PEFT_WEIGHTS, read_adapter
from diffusion.checkpoints import load_transformer, save_transformer
from diffusion.config.lora_cli import parse_lora_args
from diffusion.errors import CheckpointError, ConfigError, DataError, PixArtError
from diffusion.inference import PixArtPipeline
from diffusion.training.lora_program import train_lora
from tests.training.tiny_run import ROOT, curve


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five bundled pictures as an ImageFolder whose captions are in a column `words`."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = [json.loads(line) for line in (ROOT / "data/emoji/metadata.jsonl").read_text().splitlines()[:5]]
    for row in rows:
        shutil.copy(ROOT / "data/emoji" / row["file_name"], folder)
    lines = [json.dumps({"file_name": Path(r["file_name"]).name, "words": r["text"], "n": 1}) for r in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with weights that are not zero anywhere, as those of a trained model."""
    folder = tmp_path_factory.mktemp("base") / "pipe"
    shutil.copytree(parts / "pipe", folder)
    network = load_transformer(folder)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_transformer(network, folder / "transformer")
    return folder


def train(base: Path, pictures: Path | None, out: Path, *flags: str) -> Path:
    torch.set_num_threads(1)
    source = [] if pictures is None else [f"--train_data_dir={pictures}", "--caption_column=words"]
    command = [
        f"--pretrained_model_name_or_path={base}", f"--output_dir={out}", *source, "--report_to=none",
        "--train_batch_size=2", "--learning_rate=1e-2", "--resolution=32", "--max_train_steps=4", "--rank=2",
        "--num_train_epochs=1", "--checkpointing_steps=2", "--seed=42", *flags,
    ]  # fmt: skip
    return train_lora(parse_lora_args("", command))


@pytest.fixture(scope="module")
def run(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "lora"
    prompt = ["--validation_prompt=a red apple", "--num_validation_images=2", "--validation_epochs=1"]
    return train(base, pictures, out, "--random_flip", "--gradient_checkpointing", *prompt)


def test_the_run_folder_is_the_adapter(run: Path, base: Path) -> None:
    pipe = PixArtPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    before = pipe("a red apple", seed=0, num_inference_steps=2, output_type="latent").images
    pipe.load_lora_weights(run)
    after = pipe("a red apple", seed=0, num_inference_steps=2, output_type="latent").images
    assert not torch.equal(before, after)
    assert {path.name for path in run.glob("*.safetensors")} == {
        "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors",
    }  # fmt: skip
    assert read_adapter(run / "checkpoints/checkpoint-2").layers.keys() == read_adapter(run).layers.keys()
    assert sorted(path.name for path in (run / "validation").glob("*.png")) == [
        f"step_{step:07d}.png" for step in (0, 3, 4)
    ]
    assert (run / "features-mirrored/manifest.json").is_file()


def test_the_card(run: Path, base: Path) -> None:
    text = (run / "README.md").read_text()
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "base_model: pipe\nbase_model_relation: adapter" in head
    assert "- lora\n" in head
    assert '- text: "a red apple"\n  output:\n    url: validation/step_0000004.png' in head
    assert "![Before](validation/step_0000000.png)" in body
    assert "LoRA, rank 2, alpha 8, base in auto" in body
    assert "images a second, median" in body


def test_the_norms_are_said(run: Path) -> None:
    log = (run / "train_log.log").read_text()
    assert "change of the weights by the adapter, |change| / |weight|:" in log
    assert "attn1.to_q" in log
    assert "got no gradient" not in log


def test_resume_is_exact(run: Path, base: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    train(base, pictures, out, "--random_flip", "--gradient_checkpointing", "--max_train_steps=2")
    train(base, pictures, out, "--random_flip", "--gradient_checkpointing", "--resume_from_checkpoint=latest")
    whole, resumed = load_file(run / PEFT_WEIGHTS), load_file(out / PEFT_WEIGHTS)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert "5 pictures, 0 of them new" in (out / "train_log.log").read_text()


def test_dora_with_an_int8_text_encoder(base: Path, pictures: Path, tmp_path: Path) -> None:
    train(base, pictures, tmp_path / "dora", "--use_dora", "--max_train_steps=1")
    assert read_adapter(tmp_path / "dora").is_dora
    train(base, pictures, tmp_path / "int8", "--base_dtype=int8", "--max_train_steps=1")
    manifest = json.loads((tmp_path / "int8/features/manifest.json").read_text())
    assert manifest["fingerprint"]["int8_text"] is True


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(base: Path, pictures: Path, tmp_path: Path) -> None:
    train(base, pictures, tmp_path / "plain", "--max_train_steps=2")
    train(base, pictures, tmp_path / "compiled", "--max_train_steps=2", "--compile")
    assert json.loads((tmp_path / "compiled/config.json").read_text())["compile"] is True
    assert list(curve(tmp_path / "plain")) == [2]
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), rel=1e-3)


def test_no_effect_is_said(base: Path, pictures: Path, tmp_path: Path) -> None:
    train(base, pictures, tmp_path / "faint", "--learning_rate=1e-9", "--max_train_steps=1")
    logging.getLogger("pixart").warning("said after the run")
    log = (tmp_path / "faint/train_log.log").read_text()
    assert "will not be seen; raise the learning rate" in log
    assert "said after the run" not in log


def test_parquet(base: Path, pictures: Path, tmp_path: Path) -> None:
    import datasets

    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    table = {"photo": [str(pictures / row["file_name"]) for row in rows], "words": [row["words"] for row in rows]}
    features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "data.parquet")
    columns = ["--image_column=photo", "--caption_column=words", f"--dataset_name={tmp_path / 'data.parquet'}"]
    train(base, None, tmp_path / "out", *columns, "--max_train_steps=1", "--max_train_samples=3")
    assert "3 pictures, 3 of them new" in (tmp_path / "out/train_log.log").read_text()
    columns[1] = "--caption_column=text"
    with pytest.raises(DataError, match=r"no caption column 'text'; the columns are photo, words"):
        train(base, None, tmp_path / "out2", *columns)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank=0"], r"^--rank: lora\.rank=0 must be greater than or equal to 1"),
        (["--caption_column=text"], r"no caption column 'text'; the columns are file_name, words, n"),
        (["--resolution=100"], r"--resolution=100 must be a positive multiple of 16 px"),
        (["--use_8bit_adam"], r"--use_8bit_adam is not offered: an adapter's moments are a few MB"),
        (["--base_dtype=int4"], r"^--base_dtype: "),
        (["--use_dora", "--base_dtype=int8"], r"^--use_dora: .*needs the norms of whole weights"),
        (["--checkpoints_total_limit=1"], r"^--checkpoints_total_limit: "),
        (["--dataset_name=x/y"], r"give the pictures once"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(PixArtError, match=message) as caught:
        train(base, pictures, tmp_path / "out", *flags)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_not_there_is_said_before_features_are_made(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-9 cannot be resumed: "):
        train(base, pictures, tmp_path / "out", f"--resume_from_checkpoint={tmp_path / 'out/checkpoints/checkpoint-9'}")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no pictures with captions"):
        train(base, None, tmp_path / "out", f"--train_data_dir={tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "--dataset_name",
            "data/pokemon.parquet",
            r"^data/pokemon\.parquet: no such folder or file in .*; give a folder",
        ),
        ("--dataset_name", "gone/pokemon.parquet", r"^gone/pokemon\.parquet: no such folder or file"),
        ("--dataset_name", "./folder", r"^\./folder: no such folder or file"),
        ("--dataset_name", "a/b/c", r"^a/b/c: no such folder or file"),
        ("--dataset_name", "~/pokemon", r"^~/pokemon: no such folder or file \(the shell leaves ~ behind = as it is"),
        ("--dataset_name", "someone/pokemon", r"^someone/pokemon is no file .* could not be reached for this data set"),
        ("--dataset_name", "pokemon", r"^pokemon is no file or folder here, and http.* could not be reached"),
        ("--dataset_name", "hub:someone/pokemon", r"^someone/pokemon is no file or folder here, and http"),
        ("--pretrained_model_name_or_path", "./gone", r"^\./gone: no such folder or file in .*; give a diffusers pipe"),
        ("--pretrained_model_name_or_path", "gone/x.safetensors", r"^gone/x\.safetensors: no such folder or file"),
        ("--pretrained_model_name_or_path", "someone/model", r"^someone/model is no file .* could not be reached for"),
    ],
)
def test_what_is_neither_here_nor_to_be_had(
    flag: str, value: str, message: str, base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    begun = time.monotonic()
    with pytest.raises(PixArtError, match=message) as caught:
        train(base, None if flag == "--dataset_name" else pictures, tmp_path / "out", f"{flag}={value}")
    assert time.monotonic() - begun < 5
    assert "\n" not in str(caught.value)


def test_flags_that_messages_name_are_taken() -> None:
    """Those of the other training programs: "continue it with --resume-from latest or choose another --work-dir"."""
    args = parse_lora_args("", ["--pretrained_model_name_or_path=x", "--work-dir=w", "--resume-from=latest"])
    assert (args.work_dir, args.resume_from) == ("w", "latest")


def test_the_withdrawn_data_set_has_a_substitute(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"was withdrawn from the hub.*use lambdalabs/naruto-blip-captions"):
        train(base, None, tmp_path / "out", "--dataset_name=lambdalabs/pokemon-blip-captions")


def test_a_preset_gives_way_to_flags() -> None:
    given: list[Any] = ["--pretrained_model_name_or_path=x", "--preset=lora-8gb", "--rank=2"]
    args = parse_lora_args("", given)
    assert (args.rank, args.resolution, args.base_dtype, args.gradient_checkpointing) == (2, 512, "int8", True)


def test_a_model_that_is_no_pipeline(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(PixArtError, match=r"transformer is no diffusers pipeline"):
        train(base, pictures, tmp_path / "out", f"--pretrained_model_name_or_path={base / 'transformer'}")
    (tmp_path / "out2/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"already holds a run"):
        train(base, pictures, tmp_path / "out2")
