"""Benchmarks that need a card are tried at tiny size, so that the hour on the card is not spent on mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_memory_plans(tmp_path: Path) -> None:
    out = tmp_path / "plans.json"
    command = [sys.executable, "benchmarks/bench_memory_plans.py", "--tiny", "--device", "cpu", "--out", str(out)]
    options = ["--rows", "full", "4gb", "--steps", "2", "--repeats", "1", "--timeout_s", "500"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert set(result["rows"]) == {"full", "full x4", "4gb"}
    assert result["bars"]["latents of full and 4gb are bit-equal"] is True
    assert all(row["completes"] and row["finite"] for row in result["rows"].values())


def run(*arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_extraction(tmp_path: Path) -> None:
    out = tmp_path / "extraction.json"
    sizes = ["--captions", 40, "--original-captions", 6, "--pictures", "32:12:3:4", "64:6:2:2"]
    run("benchmarks/bench_extraction.py", "--tiny", *sizes, "--rows-per-shard", 16, "--out", out)
    result = json.loads(out.read_text())
    assert 50 < result["captions"]["mean_tokens"] < 70
    assert result["captions"]["max_tokens"] <= 120
    assert set(result["pictures"]) == {"32", "64"}
    for figures in (result["captions"], *result["pictures"].values()):
        assert all(value > 0 for value in figures.values())
        assert 0 < figures["share_of_matmul_rate"] < 1


@pytest.mark.slow
def test_loader(tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    sizes = ["--rows", 64, "--channels", 16, "--workers", 2, "--batch-size", 8, "--batches", 5]
    run("benchmarks/bench_loader.py", *sizes, "--out", out)
    assert json.loads(out.read_text())["samples_per_s"] > 0


@pytest.mark.slow
def test_training_overhead(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    run(
        "benchmarks/bench_training_overhead.py", "--tiny", "--batch-size", 4, "--steps", 4, "--warm-up", 2, "--out", out
    )
    result = json.loads(out.read_text())
    assert set(result["ms_a_step"]) == {"trainer", "without clipping", "without EMA"}
    assert all(value > 0 for value in [*result["ms_a_step"].values(), *result["ms_a_step_bare_loop"]])


@pytest.mark.slow
def test_parallel(tmp_path: Path) -> None:
    out = tmp_path / "parallel.json"
    run("benchmarks/bench_parallel.py", "--tiny", "--steps", 2, "--warm-up", 1, "--out", out)
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 8
    assert (
        len({round(row["loss"], 5) for name, row in result["rows"].items() if name.startswith("2 x") and "32" in name})
        == 1
    )
    assert (
        result["bars"]["a run that moved from ddp to full_shard to one process has the losses of one process"] is True
    )


@pytest.mark.slow
def test_presets(tmp_path: Path) -> None:
    """The command that measures presets runs them all; --child is its own way to a process a preset."""
    out = tmp_path / "presets.json"
    command = [sys.executable, "benchmarks/measure_presets.py", "--tiny", "--output", str(out)]
    command += ["--work-dir", str(tmp_path / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["presets"]
    assert set(rows) == {"scratch-tiny", "full-24gb", "full-80gb"}
    assert all(row["seconds_a_step"] > 0 and row["last_loss"] < 2 for row in rows.values())


@pytest.mark.slow
def test_saving(tmp_path: Path) -> None:
    out = tmp_path / "saving.json"
    run("benchmarks/bench_saving.py", "--width", 64, "--depth", 1, "--saves", 2, "--out", out)
    result = json.loads(out.read_text())
    assert result["background_wait_s"] > 0
    assert result["checkpoint_mb"] > 1


FEW = ["--pictures", 24, "--steps", 1, "--batch-size", 2, "--limit", 1, "--bs", 2]


def finetune(name: str, tmp_path: Path, *options: object) -> dict:
    out = tmp_path / "out.json"
    places = ["--work-dir", tmp_path / "run", "--output", out, "--grid", tmp_path / "out.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, [*FEW, *places, *options])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out.png").is_file()
    return json.loads(out.read_text())


@pytest.mark.slow
def test_finetune_lcm(tmp_path: Path) -> None:
    lora, store = tmp_path / "lora", tmp_path / "store"
    result = finetune("finetune_lcm", tmp_path, "--lora-steps", 1, "--lora", lora, "--features", store)
    assert set(result["LCM"]) == set(result["LCM-LoRA"]) == {"8 steps", "4 steps", "2 steps", "1 steps"}
    assert len(result["bars"]) == 2
    assert (lora / "adapter_model.safetensors").stat().st_size < 6e6


@pytest.mark.slow
def test_finetune_controlnet(tmp_path: Path) -> None:
    places = ["--moved", tmp_path / "moved", "--features", tmp_path / "store", "--sampling-steps", 2]
    result = finetune("finetune_controlnet", tmp_path, *places)
    assert result["bars"]["strength 0 is the base bit for bit"] is True
    assert 0 <= result["moved edges"]["f1_of_base"] <= 1


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the bundled pictures: every 150th, and the first subject of the DreamBooth benchmark."""
    folder = tmp_path_factory.mktemp("few")
    rows = [json.loads(line) for line in (ROOT / "data/emoji/metadata.jsonl").read_text().splitlines()]
    subject = next(row for row in rows if row["concept"] == "dog face")
    chosen = [*rows[::150], subject, *(row for row in rows[40:] if row["group"] == subject["group"])][:32]
    (folder / "images").mkdir()
    unique = {row["file_name"]: row for row in [*chosen[:30], subject, chosen[-1]]}
    for name in unique:
        shutil.copy(ROOT / "data/emoji" / name, folder / name)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unique.values()))
    return folder


def run_proof(name: str, data: Path, folder: Path) -> dict:  # type: ignore[type-arg]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"benchmarks/{name}.py", "--tiny", "--data", data, "--output", folder / "result.json"]
    command += ["--grid", folder / "grid.png"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "grid.png").stat().st_size > 1000
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_lora_proof(few_pictures: Path, tmp_path: Path) -> None:
    result = run_proof("finetune_lora", few_pictures, tmp_path)
    assert result["concepts"] == 4
    assert result["adapter_file_mb"] < 2
    assert result["paired_distance_lora"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dreambooth_proof(few_pictures: Path, tmp_path: Path) -> None:
    result = run_proof("finetune_dreambooth", few_pictures, tmp_path)
    assert [row["prior_preservation"] for row in result["rows"]] == [True, False]


@pytest.mark.slow
def test_finetuning(tmp_path: Path) -> None:
    run("benchmarks/bench_finetuning.py", "--tiny", "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["full", "lora", "dora", "lora int8 base"]
    assert rows[1]["trained_parameters_m"] < rows[0]["trained_parameters_m"]
