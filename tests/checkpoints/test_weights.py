"""Weights in and out: exact inverse maps, strict loads, files that are refused, whole checkpoints."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import (
    diffusers_to_native,
    load_transformer,
    load_weights,
    native_to_diffusers,
    open_checkpoint,
    read_native,
    save_transformer,
)
from diffusion.checkpoints.keys import NATIVE_ONLY
from diffusion.checkpoints.training_state import (
    latest_checkpoint,
    list_checkpoints,
    remove_stale,
    rotate,
    save_checkpoint,
    verify,
)
from diffusion.errors import CheckpointError
from diffusion.models import PixArt
from tests.checkpoints.tiny_files import SMALL, small_model


@pytest.mark.parametrize("options", [{}, {"micro_condition": True}, {"qk_norm": True}])
def test_key_maps_are_exact_inverses(options: dict) -> None:
    state = small_model(**options).state_dict()
    back = diffusers_to_native(native_to_diffusers(state))
    assert back.keys() == state.keys() - set(NATIVE_ONLY)
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_unknown_and_missing_keys_are_listed() -> None:
    state = native_to_diffusers(small_model().state_dict())
    del state["transformer_blocks.0.attn1.to_k.weight"]
    state["surprise"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"attn1.to_k.weight \(missing\).*surprise"):
        diffusers_to_native(state)
    with pytest.raises(CheckpointError, match="odd.key"):
        native_to_diffusers({"odd.key": torch.zeros(1)})


@pytest.mark.parametrize("stored", [False, True])
def test_folder_round_trip_is_bit_exact(tmp_path: Path, stored: bool) -> None:
    model = small_model(micro_condition=True, pe_interpolation=2.0)
    save_transformer(model, tmp_path / "transformer", stored_null_caption=stored)
    loaded = load_transformer(tmp_path)
    assert loaded.config == model.config
    for key, tensor in model.state_dict().items():
        if key != "y_embedder.y_embedding":
            assert torch.equal(loaded.state_dict()[key], tensor), key
    same = torch.equal(loaded.y_embedder.y_embedding, model.y_embedder.y_embedding)
    assert same == stored


def test_averaged_weights_are_preferred_on_request(tmp_path: Path) -> None:
    first, second = small_model(), small_model()
    torch.nn.init.zeros_(second.t_block[1].bias)
    save_transformer(first, tmp_path / "transformer")
    save_transformer(second, tmp_path / "transformer_ema")
    assert load_transformer(tmp_path).t_block[1].bias.abs().max() > 0
    assert load_transformer(tmp_path, ema=True).t_block[1].bias.abs().max() == 0


def test_a_model_of_another_size_lists_every_key(tmp_path: Path) -> None:
    other = PixArt(**{**SMALL, "depth": 1, "hidden_size": 64})
    with pytest.raises(CheckpointError) as error:
        load_weights(other, small_model().state_dict(), "a file")
    text = str(error.value)
    assert "\n" not in text
    assert all(key in text for key in ("blocks.1.attn.qkv.weight", "x_embedder.proj.weight", "(48, 4, 2, 2)", "a file"))


def test_native_files(tmp_path: Path) -> None:
    state = small_model().state_dict()
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"state_dict": state, "optimizer": {"step": 3}}, tmp_path / "full.pth")
    assert read_native(tmp_path / "bare.pth").keys() == read_native(tmp_path / "full.pth").keys() == state.keys()
    with pytest.raises(CheckpointError, match="state_dict_ema"):
        read_native(tmp_path / "full.pth", ema=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_native(tmp_path / "none.pth")


def test_weight_files_may_be_read_like_other_files(tmp_path: Path) -> None:
    save_transformer(small_model(), tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


class Bomb:
    def __init__(self, function: Callable, argument: object) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple:
        return self.call


def test_pickled_code_never_runs(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    marker = tmp_path / "ran"
    shell, touch = Bomb(os.system, f"touch {marker}"), Bomb(Path.touch, marker)
    torch.save({"state_dict": shell}, tmp_path / "zip.pth")
    torch.save({"state_dict": touch}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(shell, protocol=2))
    (tmp_path / "newer.bin").write_bytes(pickle.dumps(touch, protocol=4))
    for name, why in (
        ("zip.pth", "calls posix.system"),
        ("old.pth", "calls"),
        ("bare.pth", "calls posix.system"),
        ("newer.bin", "holds more than tensors"),
    ):
        with pytest.raises(CheckpointError, match=f"{name} is refused: .*its pickle {why}"):
            open_checkpoint(tmp_path / name)
    assert not marker.exists()
    assert [str(warning.message) for warning in recwarn] == [], "the error is all that a user sees"


def test_damaged_folder(tmp_path: Path) -> None:
    save_transformer(small_model(), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_transformer(tmp_path)
    with pytest.raises(CheckpointError, match="holds no transformer"):
        load_transformer(tmp_path / "elsewhere")


def write(text: str):  # type: ignore[no-untyped-def]
    def inner(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(text)

    return inner


def test_commit_verify_rotate(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        assert verify(save_checkpoint(tmp_path, step, 10, write(str(step)))) is None
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 10]
    rotate(tmp_path, 1, keep=tmp_path / "checkpoint-2")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 10]


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 1, 10, fails)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, 10, write("one"))
    newest = save_checkpoint(tmp_path, 2, 10, write("two"))
    (newest / "sub" / "data.txt").write_text("tw0")
    assert "damaged" in str(verify(newest))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert (tmp_path / "checkpoint-2.corrupt").is_dir()
    (tmp_path / "checkpoint-1" / "sub" / "data.txt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        latest_checkpoint(tmp_path)


def test_stale_staging_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-checkpoint-3-abc").mkdir()
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert latest_checkpoint(tmp_path) is None
