from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.errors import DataError
from diffusion.features import read_caption_npz, read_latents_npy


@pytest.mark.parametrize(("dtype", "mask_dtype"), [(np.float32, np.int64), (np.float16, np.int16)])
def test_caption_is_cut_by_its_mask(tmp_path: Path, dtype: type, mask_dtype: type) -> None:
    features = np.arange(120 * 8).reshape(1, 120, 8).astype(dtype)
    mask = (np.arange(120) < 7).astype(mask_dtype)[None]
    np.savez_compressed(tmp_path / "a.npz", caption_feature=features, attention_mask=mask)
    assert torch.equal(read_caption_npz(tmp_path / "a.npz", 120), torch.from_numpy(features[0, :7]))
    np.savez_compressed(tmp_path / "b.npz", caption_feature=features)
    assert read_caption_npz(tmp_path / "b.npz", 120).shape == (120, 8)


def test_latents_are_mean_and_standard_deviation(tmp_path: Path) -> None:
    moments = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", moments)
    mean, std = read_latents_npy(tmp_path / "a.npy")
    assert torch.equal(mean, torch.from_numpy(moments[:4]))
    assert torch.equal(std, torch.from_numpy(moments[4:]))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.npz does not exist"):
        read_caption_npz(tmp_path / "gone.npz", 120)
    with pytest.raises(DataError, match=r"gone\.npy does not exist"):
        read_latents_npy(tmp_path / "gone.npy")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "bad.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.npz"):
        read_caption_npz(tmp_path / "bad.npz", 120)
    with pytest.raises(DataError, match=r"bad\.npy"):
        read_latents_npy(tmp_path / "bad.npy")
    np.save(tmp_path / "flat.npy", np.zeros(8, dtype=np.float32))
    with pytest.raises(DataError, match=r"flat\.npy has shape"):
        read_latents_npy(tmp_path / "flat.npy")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "evil.npz", caption_feature=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError):
        read_latents_npy(tmp_path / "evil.npy")
    with pytest.raises(DataError):
        read_caption_npz(tmp_path / "evil.npz", 120)


def test_mask_without_tokens(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", caption_feature=np.zeros((1, 4, 8)), attention_mask=np.zeros((1, 4)))
    with pytest.raises(DataError, match="no token"):
        read_caption_npz(tmp_path / "a.npz", 120)
