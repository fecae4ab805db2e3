from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion.data import (
    AspectRatioBatchSampler,
    SampleKey,
    StoreDataset,
    TrainBatch,
    build_dataset,
    build_loader,
    collate,
)
from diffusion.data.mixed_stores import MixedStores
from diffusion.errors import DataError
from diffusion.features import FeatureRow, FeatureStore, FeatureStoreWriter
from diffusion.process import keyed_integer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows in two buckets; the first value of a tensor says which row and caption it is."""
    folder = tmp_path_factory.mktemp("store")
    writer = FeatureStoreWriter(folder, {}, torch.zeros(1, 8), rows_per_shard=5)
    for number in range(12):
        bucket = (64, 64) if number < 8 else (48, 80)
        latents = torch.full((4, bucket[0] // 8, bucket[1] // 8), float(number))
        embeds = [torch.full((1 + caption + number % 3, 8), number + caption / 8) for caption in range(1 + number % 4)]
        attributes = {"split": "train" if number % 2 else "test", "concept": str(number // 4)}
        captions = [str(caption) for caption in range(len(embeds))]
        row = FeatureRow(
            f"{number}.png",
            (100 + number, 90),
            bucket,
            (0, 0, 90, 90),
            latents,
            latents / 2,
            captions,
            embeds,
            attributes,
        )
        writer.add(row)
    writer.close()
    return folder


def test_sample_is_the_row_with_the_caption_drawn_by_its_number(root: Path) -> None:
    dataset = StoreDataset(root, seed=7)
    drawn = set()
    for number in range(40):
        sample = dataset[SampleKey(7, number)]
        caption = keyed_integer(7, "caption", number, 4)
        drawn.add(caption)
        assert (sample.key, sample.number, sample.img_hw, sample.aspect_ratio) == ("7.png", number, (107, 90), 1.0)
        assert (sample.latents_mean == 7).all()
        assert (sample.latents_std == 3.5).all()
        assert sample.caption_embeds.shape == (1 + caption + 7 % 3, 8)
        assert (sample.caption_embeds == 7 + caption / 8).all()
    assert drawn == {0, 1, 2, 3}


def test_only_the_first_captions_are_drawn_on_request(root: Path) -> None:
    dataset = StoreDataset(root, seed=7, max_captions=2)
    lengths = {len(dataset[SampleKey(7, number)].caption_embeds) for number in range(40)}
    assert lengths == {1 + 7 % 3, 2 + 7 % 3}
    assert len(dataset[SampleKey(4, 0)].caption_embeds) == 1 + 4 % 3  # it has one only


def test_split(root: Path) -> None:
    dataset = StoreDataset(root, split="train")
    assert len(dataset) == 6
    assert [dataset[SampleKey(index, 0)].key for index in range(6)] == [f"{number}.png" for number in range(1, 12, 2)]
    assert dataset.attribute("concept") == ["0", "0", "1", "1", "2", "2"]
    assert dataset.buckets == [(64, 64)] * 4 + [(48, 80)] * 2
    with pytest.raises(DataError, match="no sample in split 'valid'; it has test, train"):
        StoreDataset(root, split="valid")


def test_collate_pads_captions_and_keeps_what_is_stored(root: Path) -> None:
    dataset = StoreDataset(root)
    samples = [dataset[SampleKey(index, 100 + index)] for index in (0, 5, 7)]
    batch = collate(samples)
    assert batch.latents_mean.shape == (3, 4, 8, 8)
    assert batch.latents_mean.dtype == batch.latents_std.dtype == torch.float32
    assert batch.caption_embeds.dtype == torch.bfloat16
    assert batch.caption_mask.dtype == torch.bool
    assert batch.img_hw.tolist() == [[100, 90], [105, 90], [107, 90]]
    assert batch.aspect_ratio.tolist() == [1, 1, 1]
    assert batch.sample_numbers.tolist() == [100, 105, 107]
    assert batch.sample_numbers.dtype == torch.int64
    assert batch.keys == ["0.png", "5.png", "7.png"]
    for index, sample in enumerate(samples):
        length = len(sample.caption_embeds)
        assert batch.caption_mask[index].tolist() == [True] * length + [False] * (batch.caption_mask.shape[1] - length)
        assert torch.equal(batch.caption_embeds[index, :length], sample.caption_embeds)
        assert (batch.caption_embeds[index, length:] == 0).all()
    assert batch.caption_mask.any(dim=0).all()  # no longer than the longest caption
    moved = batch.to("cpu")
    assert isinstance(moved, TrainBatch)
    assert moved.keys == batch.keys
    assert torch.equal(moved.caption_embeds, batch.caption_embeds)


def test_collate_refuses_two_buckets(root: Path) -> None:
    dataset = StoreDataset(root)
    with pytest.raises(DataError, match=r"different sizes: 0\.png .*, 9\.png"):
        collate([dataset[SampleKey(0, 0)], dataset[SampleKey(9, 1)]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_follows_the_sampler(root: Path, num_workers: int) -> None:
    config = {"type": "Store", "root": root.name, "split": None}
    dataset = build_dataset(
        config, image_size=64, aspect_ratio_type=None, model_max_length=120, seed=0, data_root=root.parent
    )
    sampler = AspectRatioBatchSampler(dataset.buckets, batch_size=3, seed=0)
    loader = build_loader(dataset, sampler, num_workers)
    expected = [[dataset[key].key for key in micro] for micro in AspectRatioBatchSampler(dataset.buckets, batch_size=3)]
    batches = list(loader)
    assert [batch.keys for batch in batches] == expected
    assert torch.cat([batch.sample_numbers for batch in batches]).tolist() == list(range(15))
    second_epoch = list(loader)
    assert torch.cat([batch.sample_numbers for batch in second_epoch]).tolist() == list(range(15, 30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 128}, r"image_size \(64, now 128\).*--image-size 128"),
        ({"aspect_ratio_type": "ASPECT_RATIO_256"}, r"multi_scale \(False, now True\).*--multi-scale"),
        ({"model_max_length": 300}, r"max_length \(120, now 300\).*--max-length 300"),
    ],
)
def test_a_store_made_for_another_config_is_refused(
    root: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    fingerprint = {"image_size": 64, "multi_scale": False, "max_length": 120}
    writer = FeatureStoreWriter(tmp_path / "s", fingerprint, torch.zeros(1, 8))
    writer.add(FeatureStore(root).row(1))
    writer.close()
    fitting: dict[str, object] = {"image_size": 64, "aspect_ratio_type": None, "model_max_length": 120}
    data = {"type": "Store", "root": "s"}
    assert len(build_dataset(data, **fitting, seed=0, data_root=tmp_path)) == 1  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        build_dataset(data, **{**fitting, **change}, seed=0, data_root=tmp_path)  # type: ignore[arg-type]


def test_stores_mix_with_weights(root: Path, tmp_path: Path) -> None:
    second = FeatureStoreWriter(tmp_path / "b", {}, torch.zeros(1, 8))
    for number in range(6):
        row = FeatureStore(root).row(number)
        row.key = f"b/{row.key}"
        second.add(row)
    second.close()
    data = {"type": "Store", "root": str(root), "mix": {"b": 0.5}}
    options = {"image_size": 64, "aspect_ratio_type": None, "model_max_length": 120, "seed": 0, "data_root": tmp_path}
    mixed = build_dataset(data, **options)  # type: ignore[arg-type]
    assert isinstance(mixed, MixedStores)
    assert len(mixed) == 18
    assert mixed[SampleKey(13, 5)].key == "b/1.png"
    assert torch.equal(mixed[SampleKey(3, 5)].caption_embeds, StoreDataset(root)[SampleKey(3, 5)].caption_embeds)
    assert len(mixed.attribute("concept")) == 18
    sampler = AspectRatioBatchSampler(mixed.buckets, batch_size=1, repeats=mixed.repeats)
    epochs = [sorted(index for batch in sampler.plan(epoch) for index in batch) for epoch in range(2)]
    assert [epoch[:12] for epoch in epochs] == [list(range(12))] * 2  # the first store, once each
    assert sorted(epochs[0][12:] + epochs[1][12:]) == list(range(12, 18))  # half of the second, then the other half
    other = FeatureStoreWriter(tmp_path / "c", {"vae": "x"}, torch.zeros(1, 8))
    other.add(FeatureStore(root).row(0))
    other.close()
    with pytest.raises(DataError, match=r"vae \('x', now None\)"):
        build_dataset({**data, "mix": {"c": 1.0}}, **options)  # type: ignore[arg-type]


def test_stores_of_other_sizes_mix_when_the_network_takes_many_shapes(tmp_path: Path) -> None:
    made = {"root": (256, (272, 240)), "large": (512, (512, 512)), "square": (64, (64, 64))}
    for name, (size, bucket) in made.items():
        fingerprint = {"image_size": size, "multi_scale": name != "square", "max_length": 120, "vae": "v"}
        writer = FeatureStoreWriter(tmp_path / name, fingerprint, torch.zeros(1, 8))
        latents = torch.ones(4, bucket[0] // 8, bucket[1] // 8)
        for number in range(3):
            row = FeatureRow(f"{number}", bucket, bucket, (0, 0, 9, 9), latents, latents, ["c"], [torch.zeros(2, 8)])
            writer.add(row)
        writer.close()
    data = {"type": "Store", "root": "root", "mix": {"large": 1.0, "square": 2.0}}
    options = {"image_size": 256, "model_max_length": 120, "seed": 0, "data_root": tmp_path}
    mixed = build_dataset(data, **options, aspect_ratio_type="ASPECT_RATIO_256")  # type: ignore[arg-type]
    assert isinstance(mixed, MixedStores)
    sampler = AspectRatioBatchSampler(mixed.buckets, batch_size=3, repeats=mixed.repeats)
    shapes = [tuple(collate([mixed[key] for key in batch]).latents_mean.shape) for batch in sampler]
    assert sorted(shapes) == [(3, 4, 8, 8)] * 2 + [(3, 4, 34, 30), (3, 4, 64, 64)]
    with pytest.raises(DataError, match=r"image_size \(512, now 256\).*--image-size 256 --multi-scale"):
        build_dataset({"type": "Store", "root": "large"}, **options, aspect_ratio_type="ASPECT_RATIO_256")  # type: ignore[arg-type]
    square = {"type": "Store", "root": "square", "mix": {"root": 1.0}}
    with pytest.raises(DataError, match=r"image_size \(256, now 64\), multi_scale \(True, now False\)"):
        build_dataset(square, **{**options, "image_size": 64}, aspect_ratio_type=None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"max_length \(120, now 300\)"):
        build_dataset(data, **{**options, "model_max_length": 300}, aspect_ratio_type="ASPECT_RATIO_256")  # type: ignore[arg-type]
