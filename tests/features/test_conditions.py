"""Conditions of ControlNets in a store: edges, given pictures, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion.data import SampleKey, StoreDataset, collate
from diffusion.errors import CheckpointError, DataError
from diffusion.features import ExtractionSettings, FeatureStore, extract_folder
from diffusion.features.exchange import export_webdataset, import_webdataset
from diffusion.features.maintenance import merge_stores, verify_store
from diffusion.images import canny_edges, decode_image, detect_edges, encode_moments, load_vae, to_tensor
from tests.models.test_hed import random_hed
from tests.tiny import write_tiny_pipeline_parts

CANNY = ExtractionSettings(image_size=32, dtype="fp32", batch_size=2, condition="canny")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline_parts(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of 32 px with captions."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(3):
        image = Image.new("RGB", (32, 32), "black")
        image.paste("white", (4 + number, 6, 20, 24))
        image.save(root / f"{number}.png")
        (root / f"{number}.txt").write_text("a cat")
    return root


@pytest.fixture(scope="module")
def store(photos: Path, pipeline: Path) -> FeatureStore:
    extract_folder(photos, pipeline.parent / "canny", pipeline, CANNY)
    return FeatureStore(pipeline.parent / "canny")


def test_canny_edges_lie_beside_the_pictures(store: FeatureStore, photos: Path, pipeline: Path) -> None:
    assert store.fingerprint["condition"] == "canny"
    for index in range(3):
        row = store.row(index)
        edges = canny_edges(to_tensor(decode_image(photos / row.key))[None])
        mean = encode_moments(load_vae(pipeline), edges)[0][0]
        torch.testing.assert_close(row.control_mean, mean, atol=1e-4, rtol=1e-4)
        assert (row.control_mean - row.latents_mean).abs().max() > 1e-3
    dataset = StoreDataset(store.root)
    batch = collate([dataset[SampleKey(index, index)] for index in range(3)])
    assert batch.control_mean.shape == batch.latents_mean.shape
    assert torch.equal(batch.to("cpu").control_std[1], store.row(1).control_std)


def test_a_store_with_conditions_is_kept_whole(store: FeatureStore, tmp_path: Path) -> None:
    verify_store(store.root)
    export_webdataset(store.root, tmp_path / "tars")
    import_webdataset(tmp_path / "tars", tmp_path / "back")
    merge_stores([tmp_path / "back"], tmp_path / "merged")
    for index in range(3):
        again = FeatureStore(tmp_path / "merged").row(index)
        assert torch.equal(again.control_mean, store.row(index).control_mean)
        assert torch.equal(again.control_std, store.row(index).control_std)


def test_other_conditions_are_other_features(store: FeatureStore, photos: Path, pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"condition \('canny', now None\); extract into another folder"):
        extract_folder(photos, store.root, pipeline, replace(CANNY, condition=None))
    extract_folder(photos, tmp_path / "plain", pipeline, replace(CANNY, condition=None))
    plain = FeatureStore(tmp_path / "plain")
    assert plain.control(0) is None and plain.row(0).control_mean is None
    assert "condition" not in plain.fingerprint
    dataset = StoreDataset(tmp_path / "plain")
    assert collate([dataset[SampleKey(0, 0)]]).control_mean is None


def test_hed_edges_and_their_weights(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    settings = replace(CANNY, condition="hed", hed_path=tmp_path / "ControlNetHED.pth")
    with pytest.raises(CheckpointError, match=r"ControlNetHED.pth of PixArt-alpha/PixArt-alpha: put it there"):
        extract_folder(photos, tmp_path / "store", pipeline, settings)
    network = random_hed()
    torch.save(network.state_dict(), tmp_path / "ControlNetHED.pth")
    extract_folder(photos, tmp_path / "store", pipeline, settings)
    row = FeatureStore(tmp_path / "store").row(0)
    edges = detect_edges(network, to_tensor(decode_image(photos / row.key))[None])
    mean = encode_moments(load_vae(pipeline), edges)[0][0]
    torch.testing.assert_close(row.control_mean, mean, atol=1e-3, rtol=1e-3)


def test_given_pictures_have_the_sizes_of_theirs(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "depth"
    folder.mkdir()
    for number, size in enumerate([(32, 32), (32, 32), (16, 32)]):
        Image.new("RGB", size, (80 * number, 0, 0)).save(folder / f"{number}.jpg", quality=100)
    settings = replace(CANNY, condition=str(folder))
    extract_folder(photos, tmp_path / "store", pipeline, settings)
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 2 and store.fingerprint["condition"] == "pictures"
    mean = encode_moments(load_vae(pipeline), to_tensor(decode_image(folder / "1.jpg"))[None])[0][0]
    torch.testing.assert_close(store.row(1).control_mean, mean, atol=1e-4, rtol=1e-4)
    rejected = (tmp_path / "store/rejected.jsonl").read_text()
    assert "the condition has 16x32 px, its picture 32x32; make them alike" in rejected
    for name in ("1.jpg", "2.jpg"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"2 of 3 pictures cannot be used.*no condition picture of that name"):
        extract_folder(photos, tmp_path / "other", pipeline, settings)
    with pytest.raises(DataError, match="is neither canny nor hed nor a folder of pictures"):
        extract_folder(photos, tmp_path / "none", pipeline, replace(CANNY, condition="cany"))


def test_a_batch_refuses_conditions_of_other_sizes(store: FeatureStore) -> None:
    sample = StoreDataset(store.root)[SampleKey(0, 0)]
    sample.control_mean = torch.zeros(4, 2, 2)
    with pytest.raises(DataError, match=r"the condition has latents of \(4, 2, 2\), its picture of \(4, 4, 4\)"):
        collate([sample])
