"""The commands and the code of README and docs/inference.md, typed as they stand; only sizes are cut where a CPU would
take hours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.programs import run_line, run_program

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INFERENCE = (ROOT / "docs/inference.md").read_text(encoding="utf-8")
# What is appended to a command that begins so. None: it is not run here, for the reason beside it.
SMALL_TRAINING = "train_batch_size=4 max_steps=1 num_workers=0 mixed_precision=no compile=False validation.prompts=[]"
APPENDED: dict[str, str | None] = {
    "make": None,  # the continuous integration calls the targets themselves
    "pip install": None,  # would change the environment that runs this test; `make install` does the same
    'python scripts/inference.py --prompt "red apple" --lora': None,  # with its LoRA, as all of "Fine-tune", in
    "python train_scripts/train_pixart_lora_hf.py": None,  # tests/training/test_finetuning_commands.py
    "python train_scripts/train_dreambooth.py": None,
    "python train_scripts/train_diffusers.py": None,
    "python scripts/inference_lcm.py": "",
    "python scripts/inference.py": "--step 2",
    "python scripts/infer_pixart_8_bits.py": "--step 2",
    "python tools/check_data.py": "",
    "python tools/extract_features.py data/data_toy": "",
    "python tools/extract_features.py": "--limit 16",
    "python train_scripts/train.py": f"--cfg-options {SMALL_TRAINING}",
    "torchrun": SMALL_TRAINING,  # ends with --cfg-options already
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", f"{README}\n{INFERENCE}", flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [" ".join(shlex.split(line, comments=True, posix=False)) for line in text.splitlines() if line.strip()]


def run_bash(line: str, folder: Path) -> None:
    done = run_line(line, folder)
    assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"


def run_python(code: str, folder: Path) -> None:
    done = run_program(["-c", code], folder)
    assert done.returncode == 0, f"{code}: {done.stderr[-2000:]}"


@pytest.mark.slow
def test_commands(checkout: Path) -> None:
    ran = 0
    for command in commands():
        known = [start for start in APPENDED if command.startswith(start)]
        assert known, f"README command {command!r} has no entry in APPENDED"
        if (appended := APPENDED[known[0]]) is not None:
            run_bash(f"{command} {appended}", checkout)
            ran += 1
    assert ran >= 5
    assert (checkout / "output/features/emoji-256/manifest.json").is_file()
    assert (checkout / "output/samples/cat.png").is_file()
    assert len(list((checkout / "output/samples/docs").glob("*.png"))) == 5  # 2, their grid, and 1 each
    assert (checkout / "output/emoji/checkpoints/checkpoint-1/transformer_ema/config.json").is_file()


@pytest.mark.slow
def test_python_code(checkout: Path) -> None:
    for code in blocks("python"):
        run_python(code, checkout)
    assert (checkout / "apple.png").stat().st_size > 1000


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(targets) >= 4
    assert [target for target in targets if not (ROOT / target).exists()] == []
