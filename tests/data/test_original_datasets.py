from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data import SampleKey, build_dataset
from diffusion.errors import ConfigError, DataError

FEATURES = {"load_vae_feat": True, "load_t5_feat": True}


def build(data_root: Path, table: str | None = None, **config: Any) -> Any:
    return build_dataset(
        {**FEATURES, **config},
        image_size=256,
        aspect_ratio_type=table,
        model_max_length=120,
        seed=0,
        data_root=data_root,
    )


def write_features(caption: Path, latents: Path, tokens: int, size: tuple[int, int] = (256, 256)) -> None:
    for path in (caption, latents):
        path.parent.mkdir(parents=True, exist_ok=True)
    feature = np.full((1, 120, 16), tokens, dtype=np.float32)
    mask = (np.arange(120) < tokens).astype(np.int64)[None]
    np.savez_compressed(caption, caption_feature=feature, attention_mask=mask)
    np.save(latents, np.full((8, size[0] // 8, size[1] // 8), tokens, dtype=np.float32))


@pytest.fixture
def sam(tmp_path: Path) -> Path:
    root = tmp_path / "SA1B"
    (root / "partition").mkdir(parents=True)
    (root / "partition" / "part0.txt").write_text("sa_1\nsa_2\n")
    for number in (1, 2):
        write_features(
            root / "caption_feature_wmask" / f"sa_{number}.npz",
            root / "img_vae_feature" / "train_vae_256" / "noflip" / f"sa_{number}.npy",
            tokens=number,
        )
    return root


def test_sam(sam: Path) -> None:
    dataset = build(sam.parent, type="SAM", root="SA1B", image_list_txt=["part0.txt"])
    assert len(dataset) == 2
    sample = dataset[SampleKey(1, 5)]
    assert sample.caption_embeds.shape == (2, 16)
    assert sample.latents_mean.shape == sample.latents_std.shape == (4, 32, 32)
    assert (sample.img_hw, sample.aspect_ratio, sample.number) == ((256.0, 256.0), 1.0, 5)
    assert dataset.buckets == [(256, 256)] * 2


def test_missing_and_damaged_features_are_named_and_never_replaced(sam: Path) -> None:
    latents = sam / "img_vae_feature" / "train_vae_256" / "noflip" / "sa_2.npy"
    np.save(latents, np.zeros((8, 16, 16), dtype=np.float32))
    dataset = build(sam.parent, type="SAM", root="SA1B", image_list_txt=["part0.txt"])
    with pytest.raises(DataError, match=r"sa_2\.npy holds latents of \(16, 16\), its bucket needs \(32, 32\)"):
        dataset[SampleKey(1, 0)]
    latents.unlink()
    with pytest.raises(DataError, match=r"sa_2\.npy does not exist \(1 feature files are missing\)"):
        build(sam.parent, type="SAM", root="SA1B", image_list_txt=["part0.txt"])
    with pytest.raises(DataError, match=r"part9\.txt does not exist"):
        build(sam.parent, type="SAM", root="SA1B", image_list_txt=["part9.txt"])


def internal(root: Path, partition: str, latents: str, items: list[dict[str, Any]]) -> None:
    (root / partition).mkdir(parents=True)
    (root / partition / "data_info.json").write_text(json.dumps(items))
    for tokens, item in enumerate(items, start=1):
        stem = item["path"].rsplit(".", 1)[0].replace("a/b/", "a/b_")
        write_features(
            root / "caption_feature_wmask" / f"{stem}.npz", root / latents / f"{stem}.npy", tokens, item["size"]
        )


def item(path: str, height: int, width: int, size: tuple[int, int]) -> dict[str, Any]:
    return {"path": path, "height": height, "width": width, "ratio": height / width, "prompt": "p", "size": size}


@pytest.mark.parametrize("named", ["InternData", "InternalData"])
def test_internal_data_in_either_spelling(tmp_path: Path, named: str) -> None:
    items = [item("a/b/x.png", 300, 300, (256, 256)), item("a/b/y.z.jpg", 300, 200, (256, 256))]
    internal(tmp_path / "InternData", "partition", "img_vae_features_256resolution/noflip", items)
    dataset = build(tmp_path, type="InternalData", root=named, image_list_json=["data_info.json"])
    assert [len(dataset[SampleKey(index, 0)].caption_embeds) for index in range(2)] == [1, 2]
    assert dataset[SampleKey(1, 0)].aspect_ratio == 1.0
    assert dataset[SampleKey(1, 0)].img_hw == (256.0, 256.0)


def test_internal_data_ms_has_original_sizes_and_bucket_ratios(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [item("x.png", 500, 400, (272, 224)), item("y.png", 400, 800, (176, 352)), item("z.png", 90, 800, (8, 8))]
    internal(tmp_path / "D", "partition_filter", "img_vae_fatures_256_multiscale/ms", items)
    with caplog.at_level(logging.WARNING):
        dataset = build(
            tmp_path, "ASPECT_RATIO_256", type="InternalDataMS", root="D", image_list_json=["data_info.json"]
        )
    assert "1 of 3 pictures left out" in caplog.text
    first, second = (dataset[SampleKey(index, 0)] for index in range(2))
    assert (first.img_hw, first.aspect_ratio, first.latents_mean.shape) == ((500.0, 400.0), 1.21, (4, 34, 28))
    assert (second.img_hw, second.aspect_ratio) == ((400.0, 800.0), 0.5)
    assert dataset.buckets == [(272, 224), (176, 352)]
    with pytest.raises(ConfigError, match="aspect_ratio_type"):
        build(tmp_path, type="InternalDataMS", root="D", image_list_json=["data_info.json"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "is not a list"),
        ("[3]", "item 0: has no path"),
        ('[{"path": "/etc/x.png", "height": 1, "width": 1}]', "leaves the data root"),
        ('[{"path": "../x.png", "height": 1, "width": 1}]', "leaves the data root"),
        ('[{"path": "x.png", "height": NaN, "width": 1}]', "positive"),
        ('[{"path": "x.png", "height": 1, "width": 0}]', "positive"),
        ("[]", "no samples"),
    ],
)
def test_broken_index(tmp_path: Path, content: str, message: str) -> None:
    root = tmp_path / "D"
    (root / "partition").mkdir(parents=True)
    (root / "caption_feature_wmask").mkdir()
    (root / "img_vae_features_256resolution" / "noflip").mkdir(parents=True)
    (root / "partition" / "data_info.json").write_text(content)
    with pytest.raises(DataError, match=message):
        build(tmp_path, type="InternalData", root="D", image_list_json=["data_info.json"])


def test_online_encoding_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="load_vae_feat=True"):
        build(tmp_path, type="SAM", root="D", image_list_txt=["part0.txt"], load_vae_feat=False)
