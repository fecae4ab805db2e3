"""The command line of the training scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.config import config_overrides, load_config, train_parser

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
