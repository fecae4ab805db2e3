"""The comparison with diffusers: FLOPs against torch's counter, turns, parked states, and rows at tiny size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusion.errors import DeviceMemoryError
from diffusion.models import KVCompression, PixArt, PixArtMS
from diffusion.models.pixart import PixArtConfig
from tests.programs import run_program

ROOT = Path(__file__).parents[1]
SMALL = {"hidden_size": 48, "num_heads": 4, "depth": 2, "caption_channels": 32, "input_size": 8}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of benchmarks/, which import each other as programs there do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("cls", [PixArt, PixArtMS])
@pytest.mark.parametrize("tokens", [1, 7])
def test_formula_is_torchs_count(program: Any, cls: type[PixArt], tokens: int) -> None:
    flops, model = program("flops"), cls(**SMALL).eval()
    sizes = {"img_hw": torch.ones(1, 2), "aspect_ratio": torch.ones(1)} if cls is PixArtMS else {}
    latents, caption = torch.randn(1, 4, 8, 12), torch.randn(1, tokens, 32)
    counted = flops.counted_flops(lambda: model(latents, torch.ones(1), caption, torch.ones(1, tokens), **sizes))
    assert counted == flops.forward_flops(model.config, 4 * 6, tokens)


def test_formula_at_full_size(program: Any) -> None:
    flops = program("flops")
    tera = [flops.forward_flops(PixArtConfig(), tokens, 120) / 1e12 for tokens in (256, 1024, 4096)]
    assert tera == pytest.approx([0.2981, 1.2360, 6.5095], rel=1e-4)
    assert flops.training_flops(PixArtConfig(), 256, 120) == 3 * flops.forward_flops(PixArtConfig(), 256, 120)
    with pytest.raises(ValueError, match="no key-value compression"):
        flops.forward_flops(PixArtConfig(kv_compress=KVCompression(scale_factor=2, layers=(0,))), 256, 120)


class CountingArm:
    """An arm whose state is a tensor and a view of it; its calls add to the view."""

    def __init__(self, name: str, settings: list[Any], log: list[str], shares: Any = None) -> None:
        self.name, self.settings, self.log, self.calls_to_wake = name, settings, log, 1
        self.tensors = shares.tensors if shares else [torch.zeros(4)]
        self.owner = shares.owner if shares else self
        self.view = self.tensors[0][1:3]

    def build(self, setting: Any) -> Any:
        if setting.batch > 4:
            raise torch.OutOfMemoryError("too large")

        def call() -> None:
            self.log.append(self.name)
            self.view += 1

        return call

    def rest(self) -> None:
        self.log.append(f"{self.name} rests")

    def state(self) -> list[torch.Tensor]:
        return [*self.tensors, self.view]


def test_turns_keep_the_states_of_waiting_arms(program: Any) -> None:
    abab, log = program("abab"), []
    one = [abab.Setting(2)]
    first = CountingArm("A", one, log)
    arms = [first, CountingArm("B", one, log), CountingArm("C", one, log, shares=first)]
    device = torch.device("cpu")
    arms[1].calls_to_wake = 3
    results = abab.compare(arms, device, windows=3, warm_up=1, seconds=0.0, park=True)
    assert [len(result.seconds) for result in results] == [3, 3, 3]
    order = [name for index, name in enumerate(log) if index == 0 or log[index - 1] != name]
    assert order == [part for name in "ABC" for part in (name, f"{name} rests")] * 4  # warm-up, then three turns
    assert log.count("B") == log.count("A") + 3 * 2
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in first.tensors)  # parked after the last turn


def test_a_parked_state_comes_back(program: Any) -> None:
    abab, log = program("abab"), []
    first = CountingArm("A", [], log)
    sharer = CountingArm("C", [], log, shares=first)
    garage, kept = abab.Garage(), first.tensors[0]
    kept.copy_(torch.arange(4.0))
    garage.park(first)
    garage.park(sharer)  # the same state, which is in host memory already
    assert kept.untyped_storage().nbytes() == 0
    garage.wake(sharer)
    garage.wake(first)
    assert torch.equal(kept, torch.arange(4.0))
    sharer.view += 1
    assert torch.equal(kept, torch.tensor([0.0, 2, 3, 3]))  # the view is one of the same memory


def test_the_best_setting_is_found(program: Any) -> None:
    abab, log = program("abab"), []
    arm = CountingArm("A", [abab.Setting(batch) for batch in (1, 4, 64)], log)
    result = abab.choose(arm, torch.device("cpu"), warm_up=0, seconds=0.0, until=float("inf"))
    assert result.tried["batch 64"] == "out of memory"
    assert result.tried[str(result.setting)] == max(result.tried["batch 1"], result.tried["batch 4"])
    hurried = abab.choose(arm, torch.device("cpu"), warm_up=0, seconds=0.0, until=0.0)
    assert str(hurried.setting) == "batch 1"
    assert hurried.tried["batch 4"] == "not tried: out of time"
    arm.settings = [abab.Setting(64), abab.Setting(128)]
    with pytest.raises(DeviceMemoryError, match="no setting fits into memory"):
        abab.choose(arm, torch.device("cpu"), warm_up=0, seconds=0.0, until=float("inf"))


def test_peers_draw_with_their_own_layers(program: Any) -> None:
    """And with nothing of ours that the parts, which all arms copy, might have brought."""
    arms, cpu = program("sampling_arms"), torch.device("cpu")
    parts = arms.Parts.of_folder(str(ROOT / "output/pretrained_models/emoji-256"), cpu, torch.float32)
    task, setting = arms.Task(256, "a red apple"), program("abab").Setting(1)
    kinds = {"diffusers": arms.DiffusersSampling}
    for name, folded in {"diffusers": 0, "ours-plain-decoder": 0, "ours": 3}.items():
        pipeline = kinds.get(name, arms.OurSampling)(name, parts, task, [setting]).pipeline(setting)
        ours = [module for module in pipeline.vae.modules() if type(module).__module__.startswith("diffusion.")]
        assert len(ours) == folded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arms_draw_in_the_precision_of_their_parts(program: Any, dtype: torch.dtype) -> None:
    arms, size = program("sampling_arms"), program("random_parts").TINY
    parts, setting = arms.Parts.random(size, 64, torch.device("cpu"), dtype), program("abab").Setting(1)
    task = arms.Task(64, arms.prompt_of(parts.tokenizer, 20), steps=2)
    for cls, name in ((arms.OurSampling, "ours-eager"), (arms.DiffusersSampling, "diffusers")):
        images = cls(name, parts, task, [setting]).build(setting)()
        assert images.shape == (1, 3, 64, 64)
        assert images.isfinite().all()


def test_tables_are_made_of_results(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tables = importlib.import_module("performance_tables")
    assert tables.readme_table(tmp_path).startswith("Not measured yet: training, 256 px; ")
    arms = {"ours": 150.0, "ours-fp8": 180.0, "diffusers": 50.0, "diffusers-compile": 120.0}
    rows = [
        {"arm": name, "images_per_s": rate, "share": 0.5, "setting": "batch 64", "ms_a_call": 1.0}
        for name, rate in arms.items()
    ]
    facts = {"device": "a card", "versions": {"torch": "2.11", "diffusers": "0.42"}}
    rows_of_arms = rows
    (tmp_path / "compare_train-256.json").write_text(json.dumps({**facts, "rows": rows}))
    rows = [{"arm": "ours", "images_per_s": 3.0}, {"arm": "ours-without-graph", "images_per_s": 2.0}]
    (tmp_path / "levers_sample-256.json").write_text(json.dumps({**facts, "rows": rows}))
    table = tables.readme_table(tmp_path)
    assert (
        "| training, 256 px | 150 images/s (50 %) | 50 images/s (50 %) | 120 images/s (50 %) | 3.00x, 1.25x |" in table
    )
    assert "| training, 256 px, FP8 (lossy) | 180 images/s (50 %) | 50 images/s (50 %) | " in table
    assert table.count("(lossy)") == 1
    assert program("compare").ratios(rows_of_arms) == {
        "ours / ours-fp8": 0.8333,
        "ours / diffusers": 3.0,
        "ours / diffusers-compile": 1.25,
        "ours-fp8 / diffusers": 3.6,
        "ours-fp8 / diffusers-compile": 1.5,
    }
    assert "Measured on a card, torch 2.11, diffusers 0.42.\n\nNot measured yet: training, 512 px; " in table
    (tmp_path / "compare_train-512.json").write_text(json.dumps({**facts, "device": "another", "rows": []}))
    both = 'Measured on a card, torch 2.11, diffusers 0.42; "training, 512 px": another, torch 2.11, diffusers 0.42.'
    assert both in tables.readme_table(tmp_path)
    levers = "\n".join(tables.levers_section(tmp_path))
    assert "| solver loop as one CUDA graph | `--fast` | sample-256 | 1.50x | same |" in levers
    assert "python benchmarks/compare.py train-1024 --arms ours ours-compile ours-fp8" in levers


def test_a_page_gets_the_tables_it_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tables = importlib.import_module("measured_tables")
    page = "a\n<!-- table {} by tools/write_docs.py -->\n{}<!-- end of table -->\nb\n"
    for name in tables.TABLES:
        empty = tables.filled(page.format(name, ""), tmp_path)
        assert "ot measured yet" in empty and empty.startswith("a\n<!-- table") and empty.endswith("-->\nb\n")
        assert tables.filled(page.format(name, "old\n\nlines\n"), tmp_path) == empty
    pair = page.format("lora", "") + "between\n" + page.format("lcm", "")
    assert tables.filled(pair, tmp_path).count("between\n") == 1
    assert tables.filled("no marks", tmp_path) == "no marks"
    with pytest.raises(ValueError, match="there is no table 'other'; there are speed"):
        tables.filled(page.format("other", ""), tmp_path)


def run(*arguments: object, code: int = 0) -> str:
    done = run_program(arguments)
    assert done.returncode == code, done.stderr[-2000:]
    return done.stderr if code else done.stdout


QUICK = ["--device", "cpu", "--windows", 2, "--seconds", 0.05, "--warm-up", 1]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["sample-256", "train-256", "cpu-sample", "cpu-lcm"])
def test_rows(row: str, tmp_path: Path) -> None:
    out, size = tmp_path / "row.json", () if row.startswith("cpu-") else ("--tiny",)  # the bundled model has one size
    printed = run("benchmarks/compare.py", row, *size, *QUICK, "--arms", "ours-eager", "diffusers", "--output", out)
    assert "ours-eager / diffusers:" in printed
    result = json.loads(out.read_text())
    assert result["largest_difference_of_arms"] < 1e-5  # the same network in both libraries
    assert [line["arm"] for line in result["rows"]] == ["ours-eager", "diffusers"]
    assert all(len(line["seconds"]) == 2 and line["images_per_s"] > 0 for line in result["rows"])
    first, second = (line["images_per_s"] for line in result["rows"])
    assert result["ratios"]["ours-eager / diffusers"] == pytest.approx(first / second, rel=1e-3)


@pytest.mark.slow
def test_cold_start(tmp_path: Path) -> None:
    out = tmp_path / "cold.json"
    options = ["--tiny", "--device", "cpu", "--folder", tmp_path / "models", "--turns", 0, "--steps", 2]
    run("benchmarks/cold_start.py", "--row", "cold-256", *options, "--arms", "ours-eager", "diffusers", "--output", out)
    rows = json.loads(out.read_text())["rows"]
    assert all(row["import_s"] > 0.5 and row["picture_s"] > 0 for row in rows)
    assert rows[0]["seconds"] == pytest.approx(
        sum(rows[0][stage] for stage in ("import_s", "load_s", "picture_s")), abs=0.01
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare.py", "train-255"], "did you mean 'train-256'"),
        (["compare.py", "train-256", "--tiny"], "give its figures a place with --output"),
        (["cold_start.py", "--row", "cold"], "row cold does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in run(f"benchmarks/{arguments[0]}", *arguments[1:], code=2)
