"""The command line of the training scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.config import config_overrides, flag_overrides, load_config, train_parser
from diffusion.config.arguments import ArgumentParser
from diffusion.config.dreambooth_cli import dreambooth_parser
from diffusion.config.lora_cli import lora_parser
from diffusion.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("PIXART_DEBUG", "0")


def test_flags_become_overrides_that_win(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text('data = dict(type="Store", root="features")\n')
    flags = ["--work-dir", "12", "--resume-from", "latest", "--load_from", "w", "--data-root", "d"]
    options = ["--cfg-options", "seed=1", "work_dir=x", "--cfg-options", "resume_from=y"]
    args = train_parser("Train.").parse_args([str(path), *flags, *options])
    config = load_config(args.config, config_overrides(args), notify=print)
    assert (config.work_dir, config.load_from, config.data_root, config.seed) == ("12", "w", "d", 1)
    assert config.resume_from.checkpoint == "latest"


def test_defaults_leave_the_config_alone() -> None:
    args = train_parser("Train.").parse_args(["c.py"])
    assert config_overrides(args) == []
    assert (args.tracker_project_name, args.loss_report_name) == ("text2image-fine-tune", "loss")
    assert (args.report_to, args.local_rank, args.debug) == ("tensorboard", -1, False)
    assert train_parser("Train.").parse_args(["c.py"]).cfg_options == []


def test_cloud_is_short_for_the_data_root() -> None:
    assert train_parser("Train.").parse_args(["c.py", "--cloud"]).data_root == "/data/data"
    with pytest.raises(SystemExit):
        train_parser("Train.").parse_args(["c.py", "--cloud", "--data-root", "x"])


@pytest.mark.parametrize("spelling", ["--local-rank=3", "--local_rank=3"])
def test_local_rank_of_the_environment_wins(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_parser("Train.").parse_args(["c.py", spelling]).local_rank == 3
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert train_parser("Train.").parse_args(["c.py", spelling]).local_rank == 0
    assert train_parser("Train.").parse_args(["c.py"]).local_rank == 0


def test_local_rank_of_the_older_launcher_reaches_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "")  # so that the test's end restores it
    monkeypatch.delenv("LOCAL_RANK")
    config_overrides(train_parser("Train.").parse_args(["c.py"]))
    assert "LOCAL_RANK" not in os.environ
    config_overrides(train_parser("Train.").parse_args(["c.py", "--local-rank=1"]))
    assert os.environ["LOCAL_RANK"] == "1"


def test_debug_asks_for_tracebacks_only() -> None:
    args = train_parser("Train.").parse_args(["c.py", "--debug"])
    assert args.debug is True
    assert os.environ["PIXART_DEBUG"] == "1"
    assert config_overrides(args) == []


@pytest.mark.parametrize(
    "flags", [["--report_to", "wandb"], ["--wrk-dir", "x"], ["--work", "x"], ["--local-rank", "a"]]
)
def test_bad_flags_exit_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_parser("Train.").parse_args(["c.py", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "parser", [train_parser("Train."), lora_parser("Train."), dreambooth_parser("Train.")], ids=["train", "lora", "db"]
)
def test_other_trackers_are_refused_with_what_to_do(parser: ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["c.py", "--report_to", "wandb"])
    said = capsys.readouterr().err
    assert "wandb is not offered; take tensorboard (`tensorboard --logdir WORK_DIR/logs` shows it, or upload" in said
    assert "`pip install wandb && wandb sync WORK_DIR/logs`) or none; metrics.jsonl in the run folder holds" in said
    with pytest.raises(SystemExit):
        parser.parse_args(["c.py", "--report_to", "all"])
    said = capsys.readouterr().err
    assert "all is not offered; take tensorboard" in said and "wandb" not in said


def test_flags_of_a_program_s_own_are_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text('data = dict(type="Store", root="features")\n')
    parser = train_parser("Train.")
    parser.add_argument("--lora_rank", type=int)
    parser.add_argument("--lr", type=float)
    args = parser.parse_args([str(path), "--lora_rank", "0", "--cfg-options", "lora_rank=4"])
    own, named = flag_overrides(args, {"lora_rank": "lora_rank", "lr": "optimizer.lr"})
    assert (own, named) == (["lora_rank=0"], {"lora_rank": "--lora_rank"})
    with pytest.raises(ConfigError, match="^--lora_rank: lora_rank=0 must be greater than 0"):
        load_config(path, [*config_overrides(args), *own], flags=named, notify=print)


HELP = """
import sys
from diffusion.config import train_parser
try:
    train_parser("Train PixArt.").parse_args(["--help"])
except SystemExit:
    pass
heavy = {"torch", "mmengine", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_shows_defaults_and_example_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())  # argparse wraps at the width of the terminal
    assert "(default: tensorboard)" in text
    assert "python train_scripts/train.py configs/emoji/" in text
    assert "runs with your rights" in text


def test_loading_a_config_needs_no_torch() -> None:
    code = "import sys; from diffusion.config import load_config; load_config('configs/emoji/emoji_256.py'); "
    code += "assert not {'torch', 'cv2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
