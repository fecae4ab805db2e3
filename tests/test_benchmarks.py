"""Benchmarks that need a card are tried at tiny size, so that the hour on the card is not spent on mistakes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.programs import run_program

ROOT = Path(__file__).parents[1]


@pytest.fixture
def table_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The table that a page of docs/ gets, by its name, of results by theirs."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tables = importlib.import_module("measured_tables")

    def write(name: str, results: dict[str, dict[str, Any]]) -> str:
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for stem, figures in results.items():
            (folder / f"{stem}.json").write_text(json.dumps(figures))
        table: str = tables.TABLES[name](folder)
        assert "not measured yet" not in table
        return table

    return write


def run(program: str, *options: object) -> None:
    """A benchmark as a shell would start it where there is no GPU."""
    done = run_program([program, *options], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_memory_plans(tmp_path: Path, table_of: Callable[..., str]) -> None:
    out = tmp_path / "plans.json"
    options = ["--rows", "full", "full x4", "4gb", "--steps", 2, "--repeats", 1, "--timeout_s", 500]
    run("benchmarks/bench_memory_plans.py", "--tiny", "--device", "cpu", "--out", out, *options)
    result = json.loads(out.read_text())
    assert set(result["rows"]) == {"full", "full x4", "4gb"}
    assert result["bars"]["latents of full and 4gb are bit-equal"] is True
    assert all(row["completes"] and row["finite"] for row in result["rows"].values())
    assert "| `4gb` | 4.0 | " in table_of("memory_plans", {"memory_plans": result})


@pytest.mark.slow
def test_extraction(tmp_path: Path) -> None:
    out = tmp_path / "extraction.json"
    sizes = ["--captions", 40, "--original-captions", 6, "--pictures", "32:12:3:4", "64:6:2:2"]
    run("benchmarks/bench_extraction.py", "--tiny", "--eager", *sizes, "--rows-per-shard", 16, "--out", out)
    result = json.loads(out.read_text())
    assert 50 < result["captions"]["mean_tokens"] < 70
    assert result["captions"]["max_tokens"] <= 120
    assert set(result["pictures"]) == {"32", "64"}
    assert result["disk_mb_per_s"] > 0
    for figures in (result["captions"], *result["pictures"].values()):
        assert all(value > 0 for value in figures.values())
        assert 0 < figures["share_of_matmul_rate"] < 1


@pytest.mark.slow
def test_bundled_recipe(tmp_path: Path) -> None:
    """From pictures to a pipeline folder of 16 bits; the stages before and after have tests of their own."""
    captions = tmp_path / "captions"
    rows = (ROOT / "data/emoji/metadata.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    (captions / "images").mkdir(parents=True)
    (captions / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for row in rows:
        shutil.copy(ROOT / "data/emoji" / json.loads(row)["file_name"], captions / "images")
    out = tmp_path / "recipe.json"
    stages = ["vae", "decoder", "features", "transformer", "folder"]
    run("benchmarks/bundled_recipe.py", *stages, "--work", tmp_path, "--tiny", "--device", "cpu",
        "--output", out, "--from-bundled", "tokenizer", "text_encoder")  # fmt: skip
    result = json.loads(out.read_text())["stages"]
    assert list(result) == stages
    assert result["decoder"]["scaling_factor"] == result["vae"]["scaling_factor"]  # the latents stay
    assert result["transformer"]["history"][-1]["step"] == 2
    weights = tmp_path / "emoji-256/transformer/diffusion_pytorch_model.safetensors"
    assert 20e6 < weights.stat().st_size < 24e6


@pytest.mark.slow
def test_recipe_stages_and_levers(tmp_path: Path, table_of: Callable[..., str]) -> None:
    stages, levers = tmp_path / "stages.json", tmp_path / "levers.json"
    arm = "128 px first, scale 2"
    run("benchmarks/recipe_stages.py", "--tiny", "--arms", arm, "--work-dir", tmp_path / "run", "--output", stages)
    small = [
        "hidden_size=64",
        "num_heads=2",
        "train_batch_size=4",
        "num_workers=0",
        "mixed_precision=no",
        "compile=False",
    ]
    run("benchmarks/ablation_emoji.py", "--arms", "TREAD, ended", "--steps", 3, "--cfg-options", *small,
        "--features", tmp_path / "run/features-256", "--limit", 2, "--bs", 2, "--sampling-steps", 2,
        "--work-dir", tmp_path / "levers", "--output", levers, "--equal_flops")  # fmt: skip
    results = {"recipe_stages": json.loads(stages.read_text()), "ablation_levers": json.loads(levers.read_text())}
    first, last = results["recipe_stages"]["arms"][arm]["steps"]
    assert last == round(0.6 * 6) and 2.5 * 0.4 * 6 < first < 6 * 0.4 * 6  # a small picture is a quarter of the work
    assert f"| {arm} | {first} + {last} | " in table_of("stages", results)
    assert "| TREAD, ended | 4 | " in table_of("levers", results)


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
def test_training_levers(tmp_path: Path) -> None:
    out = tmp_path / "levers.json"
    arms = ["--pixels", 256, "--arms", "eager", "--steps", 1, "--windows", 2]
    run("benchmarks/bench_training_levers.py", "--tiny", *arms, "--out", out)
    result = json.loads(out.read_text())
    kinds = {"self", "text, mask", "text, spare", "text, packed", "text, direct"}
    assert {row["what"] for row in result["attention"]} == kinds
    assert not [row for row in result["attention"] if "error" in row]
    eager = result["256 px"]["eager"]
    assert eager["images_per_s"] > 0
    assert eager["profile"]["ms_a_step"]["gemm"] > 0


@pytest.mark.slow
def test_parallel(tmp_path: Path, table_of: Callable[..., str]) -> None:
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
    for row in result["rows"].values():
        row["peak_gib"] = 1.0  # of a card
    assert "| 64 px | `full_shard` | " in table_of("parallel", {"parallel": result})


@pytest.mark.slow
def test_presets(tmp_path: Path, table_of: Callable[..., str]) -> None:
    """The command that measures presets runs them all; --child is its own way to a process a preset."""
    out = tmp_path / "presets.json"
    run("benchmarks/measure_presets.py", "--tiny", "--output", out, "--work-dir", tmp_path / "runs")
    rows = json.loads(out.read_text())["presets"]
    assert set(rows) == {"scratch-tiny", "full-24gb", "full-80gb"}
    assert all(row["seconds_a_step"] > 0 and row["last_loss"] < 2 for row in rows.values())
    assert "| `full-24gb` | " in table_of("presets", {"presets": json.loads(out.read_text())})


@pytest.mark.slow
def test_saving(tmp_path: Path) -> None:
    out = tmp_path / "saving.json"
    run("benchmarks/bench_saving.py", "--width", 64, "--depth", 1, "--saves", 2, "--out", out)
    result = json.loads(out.read_text())
    assert result["background_wait_s"] > 0
    assert result["checkpoint_mb"] > 1


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the bundled pictures: of those that are trained on every 150th, and the first subject of the DreamBooth
    benchmark with its class; and two that are held out."""
    folder = tmp_path_factory.mktemp("few")
    rows = [json.loads(line) for line in (ROOT / "data/emoji/metadata.jsonl").read_text().splitlines()]
    subject = [next(row for row in rows if row["concept"] == concept) for concept in ("poodle", "dog")]
    others = [row for row in rows[::150] if row["split"] == "train"]
    chosen = [*others, *(row for row in rows[40:] if row["group"] == subject[0]["group"])][:30]
    (folder / "images").mkdir()
    held_out = [row for row in rows if row["split"] == "heldout"][:2]
    unique = {row["file_name"]: row for row in [*chosen, *subject, *held_out]}
    for name in unique:
        shutil.copy(ROOT / "data/emoji" / name, folder / name)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unique.values()))
    return folder


FEW = ["--steps", 1, "--batch-size", 2, "--limit", 1, "--bs", 2]


def finetune(name: str, data: Path, tmp_path: Path, *options: object) -> dict:
    out = tmp_path / "out.json"
    places = ["--data", data, "--work-dir", tmp_path / "run", "--output", out, "--grid", tmp_path / "out.png"]
    run(f"benchmarks/{name}.py", *FEW, *places, *options)
    assert (tmp_path / "out.png").is_file()
    return json.loads(out.read_text())


@pytest.mark.slow
def test_finetune_lcm(few_pictures: Path, tmp_path: Path, table_of: Callable[..., str]) -> None:
    lora, store = tmp_path / "lora", tmp_path / "store"
    result = finetune("finetune_lcm", few_pictures, tmp_path, "--lora-steps", 1, "--lora", lora, "--features", store)
    for name in ("undistilled", "LCM", "LCM-LoRA"):
        assert set(result[name]) == {"8 steps", "4 steps", "2 steps", "1 steps"}
    assert len(result["bars"]) == 2
    assert (lora / "adapter_model.safetensors").stat().st_size < 6e6
    table = table_of("lcm", {"finetune_lcm": result})
    assert "| undistilled | " in table and "| LCM-LoRA | " in table


@pytest.mark.slow
def test_finetune_controlnet(few_pictures: Path, tmp_path: Path, table_of: Callable[..., str]) -> None:
    places = ["--moved", tmp_path / "moved", "--features", tmp_path / "store", "--sampling-steps", 2]
    result = finetune("finetune_controlnet", few_pictures, tmp_path, *places)
    assert result["bars"]["strength 0 is the base bit for bit"] is True
    assert 0 <= result["moved edges"]["f1_of_base"] <= 1
    assert "| moved edges, pictures at 80 to 100 % of the side | " in table_of(
        "controlnet", {"finetune_controlnet": result}
    )


@pytest.mark.slow
def test_finetune_dmd(few_pictures: Path, tmp_path: Path, table_of: Callable[..., str]) -> None:
    result = finetune("finetune_dmd", few_pictures, tmp_path, "--pair-steps", 2, "--features", tmp_path / "store")
    assert result["seconds"]["pairs"] > 0
    assert "| DMD, 1 step | " in table_of("dmd", {"finetune_dmd": result})


def run_proof(name: str, data: Path, folder: Path) -> dict:  # type: ignore[type-arg]
    places = ["--output", folder / "result.json", "--grid", folder / "grid.png"]
    run(f"benchmarks/{name}.py", "--tiny", "--data", data, *places)
    assert (folder / "grid.png").stat().st_size > 1000
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_lora_proof(few_pictures: Path, tmp_path: Path, table_of: Callable[..., str]) -> None:
    result = run_proof("finetune_lora", few_pictures, tmp_path)
    assert result["concepts"] == 4
    assert result["adapter_file_mb"] < 2
    assert result["paired_distance_lora"] > 0
    assert "% of the way |" in table_of("lora", {"finetune_lora": result})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_diffusers_proof(few_pictures: Path, tmp_path: Path, table_of: Callable[..., str]) -> None:
    result = run_proof("finetune_diffusers", few_pictures, tmp_path)
    assert result["concepts"] == 4
    assert result["paired_distance_tuned"] != result["paired_distance_base"]  # its weights were drawn with
    assert "% of the way |" in table_of("diffusers", {"finetune_diffusers": result})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dreambooth_proof(few_pictures: Path, tmp_path: Path, table_of: Callable[..., str]) -> None:
    result = run_proof("finetune_dreambooth", few_pictures, tmp_path)
    assert [row["prior_preservation"] for row in result["rows"]] == [True, False]
    assert {(row["subject"], row["class"]) for row in result["rows"]} == {("poodle", "dog")}
    assert "| poodle, a dog | yes | " in table_of("dreambooth", {"finetune_dreambooth": result})


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    program = [sys.executable, "benchmarks/bench_kernels.py", "--tiny", "--device", "cpu", "--shapes", "1 x 512 px"]
    program += ["--sweep", "--kernels", "FP8 of a row", "LoRA, sums", "--output", str(tmp_path / "out.json")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}  # read where Triton is imported
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows[0]["kernel"] == "copy"
    swept = {name: [row for row in rows if row["kernel"] == name] for name in ("FP8 of a row", "LoRA, sums")}
    assert [len(found) for found in swept.values()] == [4, 4]
    assert all([row["used"] for row in found] == [True, False, False, False] for found in swept.values())
    assert all(row["us"] > 0 for row in rows)


@pytest.mark.slow
def test_finetuning(tmp_path: Path, table_of: Callable[..., str]) -> None:
    options = ["--tiny", "--device", "cpu", "--kernels", "--profile", "--output", tmp_path / "out.json"]
    run("benchmarks/bench_finetuning.py", *options)
    result = json.loads((tmp_path / "out.json").read_text())
    assert "| recomputed, kernels | 64 | controlnet | 1 | " in table_of("finetuning", {"finetuning": result})
    rows = result["rows"]
    assert all(row["profile"]["ms_a_step"]["gemm"] > 0 for row in rows)
    names = ["full", "lora", "dora", "lora int8 base", "lcm", "lcm lora", "controlnet", "dmd"]
    assert [row["row"] for row in rows] == names
    assert rows[1]["trained_parameters_m"] < rows[0]["trained_parameters_m"] < rows[-1]["trained_parameters_m"]


@pytest.mark.slow
def test_fast_sampling(tmp_path: Path) -> None:
    out = tmp_path / "fast.json"
    arms = ["plain", "loop", "graph"]
    options = ["--tiny", "--device", "cpu", "--repeats", 1, "--rows", "256", "1024-lcm", "--arms", *arms, "--stream", 2]
    run("benchmarks/check_fast_sampling.py", "--out", out, *options)
    result = json.loads(out.read_text())
    assert result["all graphs equal their loops"] is True
    assert all(list(row) == arms and row["graph"]["error"] < 0.1 for row in result["rows"].values())
    assert min(result["pictures a second, 512 px, batch 8"].values()) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scaling(tmp_path: Path) -> None:
    """All sections with one process and two; what is measured is enough to reckon with."""
    out = tmp_path / "scaling.json"
    sizes = ["--processes", 1, 2, "--sizes", 32, "--steps", 2, "--warm-up", 1, "--pictures", 1]
    run("benchmarks/scaling.py", "--tiny", *sizes, "--out", out)
    result = json.loads(out.read_text())
    rows = [(row["processes"], row["strategy"], row["batch"]) for row in result["training"]]
    assert rows == [(1, "ddp", 4), (1, "ddp", 1), (2, "ddp", 4), (2, "full_shard", 4), (2, "apart", 4)]
    assert 0 < result["training"][2]["exposed_communication_share"] <= result["training"][2]["communication_share"] < 1
    assert result["training"][2]["loss"] == pytest.approx(result["training"][3]["loss"], rel=1e-5)
    assert result["training"][4]["loss"] == result["training"][0]["loss"]  # as one process alone
    assert "communication_share" not in result["training"][4]
    assert all(0 < row["wait_s"] < row["on_disk_after_s"] for row in result["saving"])
    ways = [("alone", 1), ("guidance apart", 2), ("tokens alone shared", 2)]
    assert [(row["mode"], row["way"], row["processes"]) for row in result["sampling"]] == [
        (mode, *way) for part in (ways[:1], ways[1:]) for mode in ("plain", "fast") for way in part
    ]
    assert len({row["rms_of_latents"] for row in result["sampling"]}) == 1
    done = run_program(["tools/scaling_model.py", "--measured", out])
    assert done.returncode == 0 and "From 2 GPUs of one host" in done.stdout, done.stderr


@pytest.mark.slow
def test_small_training(tmp_path: Path) -> None:
    out = tmp_path / "small.json"
    run("benchmarks/bench_small_training.py", "--tiny", "--arms", "eager", "AdamW", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert rows["eager"]["ms_a_step"] > 0 and rows["eager"]["kernels"]["ms_a_step_all"] > 0
    assert rows["AdamW"]["first_three_steps_s"] > rows["eager"]["first_three_steps_s"]  # it compiles


def test_commands_for_a_gpu_are_those_of_the_programs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/on_gpu.py"]
    done = subprocess.run([*command, "--list"], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 30
    for line in lines:
        program, *options = line.split("python ")[1].split()
        if program != "-m":
            text = (ROOT / program).read_text() + (ROOT / "benchmarks/parallel_rows.py").read_text()
            assert not [option for option in options if option.startswith("--") and f'"{option}"' not in text], line
    wrong = subprocess.run([*command, "sampling"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown: sampling; the names are tests, ")
