from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import ConfigError, DataError
from diffusion.features import ExtractionSettings, FeatureStore, extract_folder
from diffusion.features.extract import Encoders
from diffusion.images import decode_image, encode_moments, load_vae, resize_and_crop, to_tensor
from diffusion.text import CaptionEncoder
from tests.doors import Door
from tests.tiny import write_tiny_pipeline_parts
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
SETTINGS = ExtractionSettings(image_size=32, dtype="fp32", batch_size=3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline_parts(tmp_path_factory.mktemp("pipeline"))


def make_source(root: Path, count: int) -> Path:
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = f"images/{number:03d}.png"
        height = 40 if number % 2 else 32
        Image.fromarray(rng.integers(0, 256, (height, 32, 3), dtype=np.uint8)).save(root / name)
        captions = ["a cat " * (1 + number % 4), "red"]
        rows.append(
            {"file_name": name, "text": captions[0], "captions": captions, "split": "train" if number else "test"}
        )
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if not path.name.startswith(".")}


def test_features_are_those_of_the_encoders(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 7)
    counts = extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu", rows_per_shard=4)
    assert counts == {
        "pictures": 7, "new": 7, "changed": 0, "pruned": 0, "rejected": 0, "captions_cut": 0, "enlarged": 0,
    }  # fmt: skip
    store = FeatureStore(tmp_path / "out", verify=True)
    vae, encoder = load_vae(pipeline), CaptionEncoder.from_pretrained(pipeline)
    for number in (0, 3, 6):
        row = store.row(number)
        image = decode_image(source / row.key)
        cropped, box = resize_and_crop(image, (32, 32))
        mean, std = encode_moments(vae, to_tensor(cropped)[None])
        torch.testing.assert_close(row.latents_mean, mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row.latents_std, std[0], rtol=1e-4, atol=1e-5)
        assert (row.image_size, row.bucket, row.crop_box) == ((image.height, 32), (32, 32), box)
        for caption, embeds in zip(row.captions, row.caption_embeds):
            torch.testing.assert_close(embeds, encoder.encode([caption])[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(store.null_caption, encoder.encode([""])[0][0])
    assert store.attribute("split") == ["test"] + ["train"] * 6


def test_the_vae_is_compiled_on_request_alone(pipeline: Path) -> None:
    for chosen in (False, True):
        settings = ExtractionSettings(image_size=64, compile_vae=chosen)
        vae = Encoders.find(pipeline).load_vae(torch.device("cpu"), settings)
        assert (vae.encoder._compiled_call_impl is not None) == chosen  # compiled at its first call


def test_buckets_keep_the_aspect_ratio(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 4)
    settings = ExtractionSettings(image_size=256, multi_scale=True, batch_size=2)
    extract_folder(source, tmp_path / "out", pipeline, settings, device="cpu")
    store = FeatureStore(tmp_path / "out")
    assert store.buckets() == [(256, 256), (272, 224)] * 2  # 40 / 32 = 1.25 is nearer to 1.21 than to 1.29
    assert store.row(1).latents_mean.shape == (4, 34, 28)


def test_buckets_of_another_choice_are_part_of_the_fingerprint(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 2)
    Image.new("RGB", (100, 187), "red").save(source / "images/001.png")  # 1.87: nearer to 1.91 than to 1.75 or 2.0
    usual = ExtractionSettings(image_size=256, multi_scale=True)
    extract_folder(source, tmp_path / "usual", pipeline, usual, device="cpu")
    full = replace(usual, bucket_measure="log", transposes=True)
    extract_folder(source, tmp_path / "full", pipeline, full, device="cpu")
    stores = [FeatureStore(tmp_path / name) for name in ("usual", "full")]
    assert [store.buckets()[1] for store in stores] == [(336, 192), (336, 176)]
    assert not stores[0].fingerprint.keys() & {"bucket_measure", "bucket_table", "transposes"}
    with pytest.raises(DataError, match=r"bucket_measure \(None, now 'log'\), transposes \(None, now True\)"):
        extract_folder(source, tmp_path / "usual", pipeline, full, device="cpu")
    subset = replace(usual, bucket_table="ASPECT_RATIO_512_TEST")
    assert subset.bucket_of(416, 144) == (864, 288)  # 2.89 is not in the subset
    with pytest.raises(ConfigError, match=r"--bucket-measure, --transposes chooses .* add --multi-scale"):
        replace(full, multi_scale=False)
    with pytest.raises(ConfigError, match=r"'ASPECT_RATIO_300' .* is unknown"):
        replace(usual, image_size=300)


def test_limit_splits_and_truncation_are_counted(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 9)
    settings = ExtractionSettings(image_size=32, max_length=4)
    counts = extract_folder(source, tmp_path / "out", pipeline, settings, device="cpu", limit=4, splits=["train"])
    store = FeatureStore(tmp_path / "out")
    assert counts["pictures"] == len(store) == 4
    assert counts["captions_cut"] > 0
    assert set(store.attribute("split")) == {"train"}
    assert max(len(embeds) for i in range(4) for embeds in store.row(i).caption_embeds) == 4


def test_changed_settings_or_source_do_not_mix(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 4)
    extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"image_size \(32, now 64\)"):
        extract_folder(
            source, tmp_path / "out", pipeline, ExtractionSettings(image_size=64, dtype="fp32"), device="cpu"
        )
    with pytest.raises(DataError, match=r"2 rows of pictures that this command does not select.*--prune"):
        extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu", limit=2)
    assert contents(tmp_path / "out") == before
    counts = extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu", limit=2, prune=True)
    assert counts["pruned"] == 2
    assert len(FeatureStore(tmp_path / "out", verify=True)) == 2


def test_only_what_is_new_or_has_changed_is_extracted(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 9)
    extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu", limit=6, rows_per_shard=3)
    before = FeatureStore(tmp_path / "out")
    old = {before.row(i).key: before.row(i) for i in range(6)}
    metadata = (source / "metadata.jsonl").read_text().splitlines()
    edited, repainted, touched = list(old)[1], list(old)[3], list(old)[4]
    lines = [line.replace('"red"', '"green"') if edited in line else line for line in metadata]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    Image.new("RGB", (32, 32), "blue").save(source / repainted)
    os.utime(source / touched)
    counts = extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu", rows_per_shard=3)
    assert (counts["pictures"], counts["new"], counts["changed"]) == (9, 5, 2)
    store = FeatureStore(tmp_path / "out", verify=True)
    new = {store.row(i).key: store.row(i) for i in range(9)}
    assert set(new) == {f"images/{number:03d}.png" for number in range(9)}
    assert store.column("key")[:4] == [key for key in old if key not in (edited, repainted)]  # kept in their order
    assert "green" in new[edited].captions
    assert not torch.equal(new[repainted].latents_mean, old[repainted].latents_mean)
    assert torch.equal(new[touched].latents_mean, old[touched].latents_mean)
    assert extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu")["new"] == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.arrow")) == sorted(
        [shard["name"] for shard in store.manifest["shards"]] + [store.manifest["index"]["name"]]
    )


def test_one_bad_picture_of_many_is_skipped_counted_and_listed(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 120)
    (source / "images" / "050.png").write_bytes(b"not a picture")
    counts = extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu")
    assert counts["pictures"] == 119
    assert counts["rejected"] == 1
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "images/050.png"
    assert "images/050.png" not in FeatureStore(tmp_path / "out").column("key")


def test_one_bad_picture_passes_two_stop_and_stay_stopped(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 12)
    good = (source / "images" / "000.png").read_bytes()
    for name in ("000.png", "001.png"):
        (source / "images" / name).write_bytes(bytes(len(good)))
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 12 pictures cannot be used, 1 are allowed.*--max-rejected 0\.18"):
            extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu")
        listed = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
        assert [json.loads(line)["key"] for line in listed] == ["images/000.png", "images/001.png"]
    for name in ("000.png", "001.png"):
        (source / "images" / name).write_bytes(good)
    assert extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu")["pictures"] == 12
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_a_killed_extraction_continues_to_the_same_bytes(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 130)
    (source / "images" / "006.png").write_bytes(b"not a picture")
    settings = ExtractionSettings(image_size=32, dtype="bf16", batch_size=3)
    extract_folder(source, tmp_path / "whole", pipeline, settings, device="cpu", rows_per_shard=4)
    script = (
        "import sys; from diffusion.features import *; "
        "extract_folder(*sys.argv[1:4], ExtractionSettings(image_size=32, dtype='bf16', batch_size=3), "
        "device='cpu', rows_per_shard=4)"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "cut"), str(pipeline)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until((tmp_path / "cut" / "shard-00003.arrow").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert not manifest["complete"]
    extract_folder(source, tmp_path / "cut", pipeline, settings, device="cpu", rows_per_shard=4)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_door_reports_user_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    door = Door(monkeypatch, capsys)
    assert "default: 256" in door("tools/extract_features.py", "--help").stdout
    failed = door("tools/extract_features.py", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "no such folder" in failed.stderr
    assert not (tmp_path / "out").exists()
