"""The commands and the code of docs/finetuning-distill-control.md, as they stand, on a part of the bundled data."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.house.test_readme import ROOT, run_bash, run_python

PAGE = (ROOT / "docs/finetuning-distill-control.md").read_text(encoding="utf-8")
TRAINING = (
    "--report_to none --cfg-options train_batch_size=2 max_steps=1 num_workers=0 mixed_precision=no "
    "validation.prompts=[] validation.num_samples=0"
)
# What is appended to a command that begins so.
APPENDED = {
    "python tools/extract_features.py": "--limit 8",
    "python tools/generate_dmd_pairs.py": "--steps 2",
    "python train_scripts/train_pixart_dmd.py": f"data.split=None {TRAINING.split('--cfg-options ')[1]}",
    "python train_scripts/": TRAINING,
    "python tools/make_edges.py": "",
    "python scripts/inference_lcm.py": "",
    "python scripts/inference.py": "--step 2",
}


def blocks(language: str) -> list[str]:
    # The runs of this test end after a step.
    text = re.sub(r"checkpoint-\d+", "checkpoint-1", PAGE)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_commands_and_code(checkout: Path) -> None:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [" ".join(shlex.split(line, comments=True, posix=False)) for line in text.splitlines() if line.strip()]
    for command in lines:
        known = [start for start in APPENDED if command.startswith(start)]
        assert known, f"command {command!r} has no entry in APPENDED"
        run_bash(f"{command} {APPENDED[known[0]]}", checkout)
    assert len(lines) == 10
    output = checkout / "output"
    assert (output / "lcm/checkpoints/checkpoint-1/transformer_ema/config.json").is_file()
    assert (output / "lcm-lora/checkpoints/checkpoint-1/adapter_config.json").is_file()
    assert (output / "controlnet/checkpoints/checkpoint-1/controlnet/config.json").is_file()
    assert len([*(output / "samples/lcm").glob("*.png")]) == 1
    assert len([*(output / "samples/control").glob("*.png")]) == 1
    export = "python tools/export_controlnet.py output/controlnet/checkpoints/checkpoint-1"
    run_bash(f"{export} --base output/pretrained_models/emoji-256 --output output/control.safetensors", checkout)
    for code in blocks("python"):
        run_python(code, checkout)
    for name in ("lcm", "dmd"):
        assert (checkout / f"apple-{name}.png").stat().st_size > 1000
