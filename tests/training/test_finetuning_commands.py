"""The fine-tuning commands of README and docs as they stand: the bundled model stands in for those of the hub, and a
tiny pipeline for the bundled model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from diffusion.adapters import read_adapter
from tests.programs import run_line
from tests.training.tiny_run import ROOT

PAGES = ("README.md", "docs/finetuning.md", "docs/dreambooth.md")
TEXT = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
DOORS = ("train_pixart_lora_hf.py", "train_dreambooth.py", "train_diffusers.py", "--lora output/lora")
# What is appended to a command with this word in it: sizes that a CPU does in seconds.
APPENDED = {
    "train_pixart_lora_hf.py": "--resolution=32 --train_batch_size=2 --max_train_steps=2 --mixed_precision=no "
    "--checkpointing_steps=2",
    "train_dreambooth.py": "--num_class_images 2 --cfg-options max_steps=2 image_size=32 hidden_size=32 num_heads=2 "
    "depth=1 caption_channels=32 scale_factor=0.18215 validation.prompts=[] "
    "process.prediction_type=epsilon",
    "train_diffusers.py": "--cfg-options max_steps=2 image_size=32 data.root=STORE validation.num_inference_steps=2",
    "--lora output/lora": "--step 2 --device cpu",
}
BUNDLED = "output/pretrained_models/emoji-256"
HUB = {"PixArt-alpha/PixArt-XL-2-1024-MS": str(ROOT / BUNDLED), "lambdalabs/naruto-blip-captions": "data/mine"}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line for line in lines if any(door in line for door in DOORS)]
    return list(dict.fromkeys(found))


def adjusted(command: str, parts: Path) -> str:
    command = command.replace(BUNDLED, "PIPE")
    for name, stand_in in HUB.items():
        command = command.replace(name, stand_in)
    word = next(door for door in DOORS if door in command)
    if "--lora output/lora" in command:
        command += " --model_path PIPE --pipeline_load_from PIPE"
    if "train_dreambooth" in command:
        command = command.replace(" --rank", " --load-from PIPE --rank")
    appended = APPENDED[word]
    if "train_dreambooth" in command:
        appended = appended.replace("--cfg-options", "--load-from PIPE --cfg-options pipeline_load_from=\"'PIPE'\"")
    if "--class_prompt" not in command:
        appended = appended.replace("--num_class_images 2 ", "")
    return f"{command} {appended}".replace("PIPE", str(parts / "pipe")).replace("STORE", f"\"'{parts / 'store'}'\"")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository with an output folder of its own, and the pictures that the commands speak of."""
    root = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in ("output", ".git", "data"):
            (root / path.name).symlink_to(path)
    (root / "data/mine").mkdir(parents=True)
    (root / "photos/my-dog").mkdir(parents=True)
    (root / "data/data_toy").symlink_to(ROOT / "data/data_toy")
    lines = []
    for number, path in enumerate(sorted((ROOT / "data/emoji/images").iterdir())[:3]):
        shutil.copy(path, root / "photos/my-dog")
        shutil.copy(path, root / "data/mine")
        lines.append(f'{{"file_name": "{path.name}", "text": "picture {number}"}}')
    (root / "data/mine/metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("number", range(9))  # in their order: drawing needs the adapter of the command before
def test_command(number: int, checkout: Path, parts: Path) -> None:
    command = commands()[number]
    out = re.search(r"(?:--output_dir=|--work-dir )(\S+)", command)
    folder = None if out is None else checkout / shlex.split(out[1])[0]
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    line = adjusted(command, parts)
    done = run_line(line, checkout)
    assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
    if folder is None:
        return
    assert (folder / "README.md").read_text().startswith("---\n")
    rank = re.search(r"--rank[ =](\d+)", command)
    if rank is not None:
        assert {factors.rank for factors in read_adapter(folder).layers.values()} == {int(rank[1])}
    if "--class_prompt" in command:
        assert len(list((folder / "class_pictures").glob("*.png"))) == 2


def test_there_are_commands() -> None:
    assert len(commands()) == 9
    assert sum("accelerate launch" in command for command in commands()) == 1
