"""The check of official files, on the bundled model dressed as a native file of its own name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import load_transformer
from diffusion.checkpoints.published import Recorded
from diffusion.errors import CheckpointError
from diffusion.evaluation.official import Report, _check_parity, verify_official
from diffusion.models import PixArt
from tests.doors import Door

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "output/pretrained_models/emoji-256"
OPTIONS = {"hidden_size": 256, "depth": 10, "num_heads": 4, "caption_channels": 256}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "Emoji-256.pth"
    torch.save({"state_dict": load_transformer(BUNDLED).state_dict(), "epoch": 1}, path)
    return path


def recorded(**changes: object) -> dict[str, Recorded]:
    state = PixArt(**OPTIONS).state_dict()
    parameters = sum(p.numel() for p in PixArt(**OPTIONS).parameters())
    values = {"network": PixArt, "options": OPTIONS, "num_keys": len(state), "num_parameters": parameters}
    return {"Emoji-256": Recorded(**{**values, "num_diffusers_keys": 0, **changes})}


def test_a_good_file_passes_every_check_and_a_picture_is_drawn(native: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cactus.png"
    report = verify_official(native, pipeline=BUNDLED, picture=picture, recorded=recorded())
    assert report.failures == 0, report.text()
    text = report.text()
    assert text.startswith("### Emoji-256.pth: 7 of 7 checks passed\n\n```\n")
    for fact in ("sha256", "top level: state_dict, epoch", "PixArt-alpha 256 px", "null caption: std", "parity with"):
        assert fact in text
    assert picture.stat().st_size > 1000


def test_wrong_counts_and_shapes_fail(native: Path) -> None:
    report = verify_official(native, recorded=recorded(num_keys=9, num_parameters=8, options={**OPTIONS, "depth": 9}))
    failed = [text for mark, text in report.lines if mark == "FAIL"]
    assert len(failed) == 4
    assert failed[0].startswith("keys: ") and failed[0].endswith("recorded 9")
    assert "blocks.9.attn.qkv.weight" in failed[2]
    with pytest.raises(CheckpointError, match="choose one of Emoji-256"):
        verify_official(native, name="Emoji-512", recorded=recorded())


def test_a_network_that_computes_something_else_fails_the_parity() -> None:
    network = load_transformer(BUNDLED)
    report = Report("x")
    _check_parity(network, report)
    assert report.failures == 0
    network.blocks[3].attn.num_heads = 8  # same weights, other heads
    _check_parity(network, report)
    assert report.failures == 1


def test_a_model_that_diffusers_does_not_have_says_so() -> None:
    report = Report("x")
    _check_parity(PixArt(**{**OPTIONS, "depth": 1}, qk_norm=True), report)
    assert report.lines[0][0] == "info" and "not possible" in report.lines[0][1]


def test_the_tool_exits_with_2_when_a_check_fails(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Door(monkeypatch, capsys)
    flags = ["--name", "PixArt-XL-2-256x256", "--device", "cpu", "--output", tmp_path / "text.md"]
    done = run("tools/verify_official.py", native, *flags)
    assert done.returncode == 2
    assert "checks failed for" in done.stderr and done.stderr.count("\n") == 1
    assert "parameters: 11," in done.stdout and "recorded 610,856,096" in done.stdout
    assert (tmp_path / "text.md").read_text(encoding="utf-8") in done.stdout
