"""Extraction by several processes, killed and continued; and into the original's files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.config.extraction_cli import extraction_parser
from diffusion.data import SampleKey, build_dataset
from diffusion.errors import ConfigError, DataError, WorkDirLockedError
from diffusion.features import ExtractionSettings, FeatureStore, extract_folder
from diffusion.features.cli import run_extraction
from diffusion.files import FolderLock
from tests.features.test_extract import SETTINGS, contents, make_source
from tests.programs import below_file_size
from tests.tiny import write_tiny_pipeline_parts
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline_parts(tmp_path_factory.mktemp("pipeline"))


def door(name: str, *arguments: object, processes: int = 1) -> list[str]:
    script = [str(REPOSITORY / "tools" / f"{name}.py"), *map(str, arguments)]
    if processes == 1:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *script]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_make_what_one_makes_even_when_killed(tmp_path: Path, pipeline: Path) -> None:
    # 40 captions a picture: a shard then holds 102 pictures, so 230 pictures are three blocks.
    source = make_source(tmp_path / "src", 230)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["captions"] = [f"a cat and {number} dogs" for number in range(39)]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "images" / "007.png").write_bytes(b"not a picture")
    settings = ["--image-size", 32, "--dtype", "fp32", "--pretrained", pipeline, "--batch-size", 3, "--device", "cpu"]
    run(door("extract_features", source, "--out", tmp_path / "one", *settings))  # a program too: as many threads
    command = door("extract_features", source, "--out", tmp_path / "two", *settings, processes=2)
    process = subprocess.Popen(
        command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: list((tmp_path / "two" / ".blocks").glob("*.json")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match="interrupted"):
        FeatureStore(tmp_path / "two")
    out = run(command)
    assert "229 pictures" in out
    assert "1 rejected" in out
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    store = FeatureStore(tmp_path / "one", verify=True)
    assert len(set(store.column("key"))) == len(store) == 229
    assert [shard["rows"] for shard in store.manifest["shards"]] == [101, 102, 26]


def test_two_extractions_do_not_write_into_one_store(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 2)
    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(WorkDirLockedError, match="choose another --out"):
        extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu")
    lock.release()
    assert extract_folder(source, tmp_path / "out", pipeline, SETTINGS, device="cpu")["pictures"] == 2


def test_a_full_disk_is_one_line_and_the_store_continues(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 12)
    arguments = door("extract_features", source, "--out", tmp_path / "out", "--pretrained", pipeline)[1:]
    command = [sys.executable, *below_file_size(3000, [*arguments, "--image-size", "32", "--device", "cpu"])]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 74, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.tmp*"))
    settings = ExtractionSettings(image_size=32)
    assert extract_folder(source, tmp_path / "out", pipeline, settings, device="cpu")["pictures"] == 12


def test_all_pictures_broken_fails_before_the_encoders_are_loaded(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 40)
    for path in (source / "images").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of 32 pictures can be read"):
        extract_folder(source, tmp_path / "out", tmp_path / "no encoders here", SETTINGS)


def test_small_pictures_are_enlarged_and_counted_or_rejected(tmp_path: Path, pipeline: Path) -> None:
    source = make_source(tmp_path / "src", 4)
    Image.new("RGB", (64, 64)).save(source / "images" / "001.png")
    counts = extract_folder(source, tmp_path / "a", pipeline, ExtractionSettings(image_size=64), device="cpu")
    assert (counts["enlarged"], counts["pictures"]) == (3, 4)
    settings = ExtractionSettings(image_size=64, small="reject")
    counts = extract_folder(source, tmp_path / "b", pipeline, settings, device="cpu", max_rejected=1)
    assert (counts["rejected"], counts["pictures"]) == (3, 1)
    assert "32x32 px is smaller than its bucket 64x64" in (tmp_path / "b" / "rejected.jsonl").read_text()


def toy(root: Path) -> Path:
    """The original's toy data: one folder that is a SAM layout and has a JSON list beside it."""
    names, items = ["red_apple", "dog.v2", "boat"], []
    rng = np.random.default_rng(0)
    for folder in ("images", "captions", "partition"):
        (root / "SA1B" / folder).mkdir(parents=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (48, 32, 3), dtype=np.uint8)).save(root / "SA1B/images" / f"{name}.jpg")
        (root / "SA1B/captions" / f"{name}.txt").write_text(f"a {name} cat")
        path = f"SA1B/images/{name}.jpg"
        items.append({"height": 48, "width": 32, "ratio": 1.5, "path": path, "prompt": f"a {name} cat"})
    (root / "SA1B/partition/part0.txt").write_text("\n".join(names))
    (root / "data_info.json").write_text(json.dumps(items))
    return root


def typed(*arguments: object, **parts: bool) -> str:
    """What an extraction program does with these arguments, in this process."""
    return run_extraction(extraction_parser(None, **parts).parse_args([str(argument) for argument in arguments]))


def dataset(kind: str, root: Path, **options: object) -> object:
    lists = {"SAM": {"image_list_txt": ["part0.txt"]}}.get(kind, {"image_list_json": ["data_info.json"]})
    data = {"type": kind, "root": "SA1B" if kind == "SAM" else "", "load_vae_feat": True, "load_t5_feat": True, **lists}
    defaults = {"image_size": 32, "aspect_ratio_type": None, "model_max_length": 120, "seed": 0, "data_root": root}
    return build_dataset(data, **{**defaults, **options})


def test_the_two_steps_of_the_original_fit_each_other(tmp_path: Path, pipeline: Path) -> None:
    root = toy(tmp_path / "toy")
    common = ["--json_path", root / "data_info.json", "--dataset_root", root, "--pretrained_models_dir", pipeline]
    common += ["--device", "cpu", "--dtype", "fp32"]
    captions = ["--t5_save_root", root / "caption_feature_wmask"]
    pictures = ["--vae_save_root", root / "img_vae_features"]
    out = run(door("extract_features", *common, "--img_size", 32, *captions, *pictures))  # as a person types it
    assert "3 captions and 3 pictures written" in out
    assert (root / "img_vae_features/32resolution/noflip/red_apple.npy").is_file()
    with np.load(root / "caption_feature_wmask/dog.v2.npz") as file:
        assert file["caption_feature"].shape == (1, 120, 32)
        assert file["attention_mask"].sum() > 3
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*.np[yz]")}
    (root / "img_vae_features/32resolution/noflip/boat.npy").unlink()
    out = typed(*common, "--img_size", 32, *pictures, captions=False)
    assert "1 pictures written" in out
    assert "0 captions and 0 pictures" in typed(*common, *captions, pictures=False)
    kept = [path for path, time_ns in written.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) == 5
    extract_folder(root, tmp_path / "store", pipeline, SETTINGS, device="cpu")
    store = FeatureStore(tmp_path / "store")
    sam, internal = dataset("SAM", root), dataset("InternalData", root)
    for number in range(3):
        for kind in (sam, internal):
            sample = kind[SampleKey(number, number)]  # type: ignore[index]
            torch.testing.assert_close(sample.latents_mean, store.row(number).latents_mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(sample.caption_embeds, store.row(number).caption_embeds[0], rtol=1e-5, atol=1e-6)


def test_multi_scale_files_and_a_clash_of_names(tmp_path: Path, pipeline: Path) -> None:
    root = toy(tmp_path / "toy")
    common = ["--json_file", root / "data_info.json", "--dataset_root", root, "--pretrained_models_dir", pipeline]
    common += ["--device", "cpu", "--img_size", 256, "--multi_scale"]
    typed(*common, "--t5_save_root", root / "caption_feature_wmask", "--vae_save_root", root / "img_vae_features")
    assert (root / "img_vae_features/VAE-ms.txt").read_text().split()[0] == "images_red_apple.npy"
    scaled = dataset("InternalDataMS", root, image_size=256, aspect_ratio_type="ASPECT_RATIO_256")
    assert scaled[SampleKey(1, 1)].latents_mean.shape == (4, 38, 26)  # type: ignore[index]  # 1.46: 304 x 208
    (root / "SA1B/other").mkdir()
    (root / "SA1B/images/boat.jpg").rename(root / "SA1B/other/red_apple.jpg")
    items = json.loads((root / "data_info.json").read_text())
    items[2]["path"] = "SA1B/other/red_apple.jpg"
    (root / "data_info.json").write_text(json.dumps(items))
    square = [argument for argument in common if argument != "--multi_scale"]
    with pytest.raises(DataError, match=r"images/red_apple\.jpg' and .*other/red_apple\.jpg' would both be stored as"):
        typed(*square, "--vae_save_root", root / "v", captions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the pictures once"),
        (["x"], "give --out for a feature store"),
        (["x", "--out", "y", "--t5_save_root", "z"], "give --out for a feature store"),
        (["x", "--out", "y", "--image-size", "100"], "multiple of 8"),
        (["x", "--out", "y", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["x", "--out", "y", "--start_index", "3"], "torchrun"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(*arguments)
