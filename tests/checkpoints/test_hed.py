"""The HED weight file, of full size with random weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import load_hed, save_tensors
from diffusion.errors import CheckpointError
from tests.checkpoints.tiny_files import same_tensors, small_model
from tests.models.test_hed import random_hed


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(random_hed().state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_load_as_they_are(state: dict[str, torch.Tensor], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"ControlNetHED{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_tensors(state, path)
    network = load_hed(path)
    assert same_tensors(dict(network.state_dict()), state)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_an_absent_file_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_hed(tmp_path / "ControlNetHED.pth")
    text = str(error.value)
    assert "no such file; the HED edge network is ControlNetHED.pth of PixArt-alpha/PixArt-alpha: put it there" in text
    assert "--model_names ControlNetHED.pth --only_models` put it at output/pretrained_models/ControlNetHED.pth" in text
    assert "\n" not in text


def test_other_files_are_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "hed.pth"
    torch.save(small_model().state_dict(), path)
    with pytest.raises(CheckpointError, match="holds no HED edge network, only pos_embed, ...; give ControlNetHED.pth"):
        load_hed(path)
    short = {key: tensor for key, tensor in state.items() if not key.startswith("block5")}
    torch.save({**short, "norm": torch.zeros(3)}, path)
    with pytest.raises(
        CheckpointError, match=r"missing: block5.convs.0.weight.*; other shape: norm \(file \(3,\), model"
    ):
        load_hed(path)
    torch.save({}, path)
    with pytest.raises(CheckpointError, match="only nothing"):
        load_hed(path)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_pickled_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"norm": _Bomb()}, "hed.pth")
    with pytest.raises(CheckpointError, match="is refused: its pickle calls .*; take the file from its publisher"):
        load_hed("hed.pth")
    assert not (tmp_path / "exploded").exists()
