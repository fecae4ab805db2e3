from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion import images
from diffusion.errors import ConfigError
from diffusion.images import aspect_ratio_table, closest_bucket, with_transposes


def test_1024_table_has_the_documented_properties() -> None:
    table = images.ASPECT_RATIO_1024
    assert len(table) == 40
    for key, (height, width) in table.items():
        assert key == str(round(height / width, 2))
        assert height % 64 == 0
        assert width % 64 == 0
        assert 0.902 <= height * width / 1024**2 <= 1.0
    transposed = {(width, height) for height, width in table.values()} - set(table.values())
    assert transposed == {(1344, 704)}  # 1.91 is missing in the original's list


@pytest.mark.parametrize(("base", "factor"), [(256, 0.25), (512, 0.5), (2048, 2)])
def test_other_tables_are_the_1024_table_scaled(base: int, factor: float) -> None:
    scaled = {key: (height * factor, width * factor) for key, (height, width) in images.ASPECT_RATIO_1024.items()}
    assert aspect_ratio_table(f"ASPECT_RATIO_{base}") == scaled


@pytest.mark.parametrize(
    ("name", "key", "size"),
    [
        ("ASPECT_RATIO_256", "0.72", (208, 288)),
        ("ASPECT_RATIO_512", "2.89", (832, 288)),
        ("ASPECT_RATIO_1024", "1.0", (1024, 1024)),
        ("ASPECT_RATIO_2048", "3.88", (3968, 1024)),
        ("ASPECT_RATIO_2880", "0.55", (2112, 3840)),
        ("ASPECT_RATIO_2880_TEST", "0.26", (2048, 7936)),
    ],
)
def test_sizes_of_the_specification(name: str, key: str, size: tuple[int, int]) -> None:
    assert aspect_ratio_table(name)[key] == size


def test_2880_table_is_the_floored_1024_table() -> None:
    table = images.ASPECT_RATIO_2880
    floored = {tuple(int(side * 2.8125) // 64 * 64 for side in size) for size in images.ASPECT_RATIO_1024.values()}
    assert len(table) == 40
    assert set(table.values()) - floored == {(2112, 3840), (3840, 2112)}
    assert [key for key, (h, w) in table.items() if key != str(round(h / w, 2))] == [
        "0.25",
        "0.26",
        "0.27",
        "0.28",
        "4.0",
    ]


def test_inference_tables_are_33_key_subsets() -> None:
    for base in (256, 512, 1024, 2048):
        table, subset = aspect_ratio_table(f"ASPECT_RATIO_{base}"), aspect_ratio_table(f"ASPECT_RATIO_{base}_TEST")
        assert len(subset) == 33
        assert subset.items() <= table.items()
        assert ("0.28" in subset, "0.26" in subset) == ((False, True) if base == 2048 else (True, False))
    doubled = {key: (2 * h, 2 * w) for key, (h, w) in images.ASPECT_RATIO_2048_TEST.items()}
    assert doubled == images.ASPECT_RATIO_2880_TEST


def test_closest_bucket_by_absolute_difference_of_ratios() -> None:
    table = images.ASPECT_RATIO_256
    assert closest_bucket(264, 256, table) == "1.0"
    assert closest_bucket(100, 1000, table) == "0.25"
    assert closest_bucket(9000, 100, table) == "4.0"
    # 1.83 is nearer to 1.75 by difference (0.08 against 0.17); by logarithm too, but 2.2 is not: 2.09, not 2.4.
    assert closest_bucket(183, 100, table) == "1.75"
    assert closest_bucket(220, 100, table) == "2.09"
    with pytest.raises(ValueError, match="positive"):
        closest_bucket(0, 10, table)


TABLES = [f"ASPECT_RATIO_{base}{kind}" for base in (256, 512, 1024, 2048, 2880) for kind in ("", "_TEST")]


@pytest.mark.parametrize("name", TABLES)
def test_a_picture_and_the_same_on_its_side_lie_in_transposed_buckets(name: str) -> None:
    full = with_transposes(aspect_ratio_table(name))
    assert {(width, height) for height, width in full.values()} == set(full.values())
    assert [float(key) for key in full] == sorted(float(key) for key in full)
    assert aspect_ratio_table(name).items() <= full.items()
    for height, width in ((100, 191), (333, 1000), (640, 480), (77, 100), (999, 1000), (10, 90)):
        upright, turned = (full[closest_bucket(*size, full, "log")] for size in ((height, width), (width, height)))
        assert upright == turned[::-1]


def test_only_one_transpose_is_missing() -> None:
    for base, size in ((256, (336, 176)), (1024, (1344, 704))):
        table = aspect_ratio_table(f"ASPECT_RATIO_{base}")
        assert with_transposes(table).items() - table.items() == {("1.91", size)}


@given(st.floats(0.05, 20), st.sampled_from(TABLES))
def test_the_nearest_bucket_in_log_space_is_the_one_that_crops_least(ratio: float, name: str) -> None:
    table = aspect_ratio_table(name)
    # A picture of 1 x ratio covers h x w and loses the share by which the ratios differ.
    kept = {key: min(h / w / ratio, ratio / (h / w)) for key, (h, w) in table.items()}
    assert kept[closest_bucket(ratio, 1, table, "log")] == pytest.approx(max(kept.values()))


def test_unknown_table_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ASPECT_RATIO_1024'"):
        aspect_ratio_table("ASPECT_RATI_1024")
