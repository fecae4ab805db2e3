"""--doctor: what is wrong before a run, as a table and an exit code."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.config import load_config
from diffusion.ranks import Ranks
from diffusion.training.doctor import Finding, check_up, examine, save_bytes
from tests.programs import run_program
from tests.training.tiny_run import run

Usage = namedtuple("Usage", "total used free")


def findings(config_file: Path, work_dir: Path, *options: str) -> dict[str, list[Finding]]:
    by_subject: dict[str, list[Finding]] = {}
    for finding in examine(load_config(config_file, list(options)), work_dir, Ranks()):
        by_subject.setdefault(finding.subject, []).append(finding)
    return by_subject


def test_a_sound_set_up(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(config_file, tmp_path / "new/run")
    assert set(found) == {"devices", "communication", "disk", "features", "config"}
    assert not [finding for group in found.values() for finding in group if finding.status == "fail"]
    assert not (tmp_path / "new").exists()
    assert check_up(load_config(config_file), tmp_path / "new/run") == 0
    assert re.search(r"^\d+ checks: 0 failed, \d warnings$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize(
    ("has_products", "precision", "said"),
    [(True, "no", "'bf16' with"), (True, "bf16", None), (False, "bf16", "='no' is faster"), (False, "no", None)],
)
def test_the_faster_precision_of_a_cpu(
    has_products: bool, precision: str, said: str | None, config_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("diffusion.training.doctor.cpu_multiplies_bfloat16", lambda: has_products)
    _, *more = findings(config_file, tmp_path, f"mixed_precision={precision}")["devices"]
    assert [finding.text for finding in more if said and said in finding.text] == [finding.text for finding in more]
    assert len(more) == (said is not None)


def test_the_size_of_a_save_is_that_of_a_save(config_file: Path, tmp_path: Path) -> None:
    size = ["hidden_size=256", "depth=10", "num_heads=4"]  # beside it, the names of the tensors take no room
    run(load_config(config_file, [*size, "max_steps=1", "validation.num_samples=0"]), tmp_path / "run")
    files = (tmp_path / "run/checkpoints/checkpoint-1").rglob("*")
    written = sum(path.stat().st_size for path in files if path.is_file())
    assert save_bytes(load_config(config_file, size)) == pytest.approx(written, rel=0.05)


def test_a_full_disk_damaged_features_and_wrong_weights_are_found(
    config_file: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(parts / "store", tmp_path / "store")
    shard = next((tmp_path / "store").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    size = save_bytes(load_config(config_file))
    for free, status in ((size // 2, "fail"), (2 * size, "warn"), (10 * size, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: Usage(0, 0, free))
        found = findings(config_file, tmp_path, f"data.root={str(tmp_path / 'store')!r}", f"load_from={parts / 'pipe'}")
        assert [finding.status for finding in found["disk"]] == [status]
    assert "is damaged (its hash differs)" in found["features"][-1].text
    assert found["config"][0].status == "fail" and "does not fit the model" in found["config"][0].text


@pytest.mark.slow
def test_the_program(config_file: Path, tmp_path: Path) -> None:
    command = ["train_scripts/train.py", str(config_file), "--work-dir", str(tmp_path / "run"), "--doctor"]
    done = run_program(command)
    assert (done.returncode, "0 failed" in done.stdout) == (0, True), done.stderr
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_program([*launcher, *command, "--cfg-options", "caption_channels=64"])
    assert done.returncode != 0
    assert "gloo sums 64 MiB over 2 processes" in done.stdout
    assert re.search(r"^fail  features .*caption_channels=64", done.stdout, re.MULTILINE)
