"""Aspect-ratio buckets: tables of picture sizes with about equal area, one per base resolution.

A table maps a key, height / width as text, to (height, width) in pixels. The 256, 512 and 2048 tables are the 1024
table scaled, under the same keys. `_TEST` tables are the subsets offered at inference.
"""

from __future__ import annotations

import difflib
import math
from typing import Literal

from diffusion.errors import ConfigError

BucketTable = dict[str, tuple[int, int]]
Measure = Literal["difference", "log"]

# (height, width) in units of 64 px at base 1024.
_SIZES_1024 = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9),
    (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip

# The 2880 table is written out: it is floored to multiples of 64, with exceptions in one pair and in five keys.
_TABLE_2880 = """
0.25:1408x5760 0.26:1408x5568 0.27:1408x5376 0.28:1408x5184 0.32:1600x4992 0.33:1600x4800 0.34:1600x4672
0.4:1792x4480 0.42:1792x4288 0.47:1920x4096 0.49:1920x3904 0.51:1920x3776 0.55:2112x3840 0.59:2112x3584
0.68:2304x3392 0.72:2304x3200 0.78:2496x3200 0.83:2496x3008 0.89:2688x3008 0.93:2688x2880 1.0:2880x2880
1.07:2880x2688 1.12:3008x2688 1.21:3008x2496 1.28:3200x2496 1.39:3200x2304 1.47:3392x2304 1.7:3584x2112
1.82:3840x2112 2.03:3904x1920 2.13:4096x1920 2.39:4288x1792 2.5:4480x1792 2.92:4672x1600 3.0:4800x1600
3.12:4992x1600 3.68:5184x1408 3.82:5376x1408 3.95:5568x1408 4.0:5760x1408
"""

_NOT_IN_TEST = {"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"}
_NOT_IN_TEST_2048 = (_NOT_IN_TEST - {"0.26"}) | {"0.28"}


def _scaled(unit_px: int) -> BucketTable:
    return {str(round(height / width, 2)): (height * unit_px, width * unit_px) for height, width in _SIZES_1024}


def _without(table: BucketTable, keys: set[str]) -> BucketTable:
    return {key: size for key, size in table.items() if key not in keys}


def _parsed(text: str) -> BucketTable:
    table = {}
    for entry in text.split():
        key, size = entry.split(":")
        height, width = size.split("x")
        table[key] = (int(height), int(width))
    return table


ASPECT_RATIO_256 = _scaled(16)
ASPECT_RATIO_512 = _scaled(32)
ASPECT_RATIO_1024 = _scaled(64)
ASPECT_RATIO_2048 = _scaled(128)
ASPECT_RATIO_2880 = _parsed(_TABLE_2880)
ASPECT_RATIO_256_TEST = _without(ASPECT_RATIO_256, _NOT_IN_TEST)
ASPECT_RATIO_512_TEST = _without(ASPECT_RATIO_512, _NOT_IN_TEST)
ASPECT_RATIO_1024_TEST = _without(ASPECT_RATIO_1024, _NOT_IN_TEST)
ASPECT_RATIO_2048_TEST = _without(ASPECT_RATIO_2048, _NOT_IN_TEST_2048)
# As in the original, the 2880 TEST table holds sizes of base 4096.
ASPECT_RATIO_2880_TEST = _without(_scaled(256), _NOT_IN_TEST_2048)

_TABLES: dict[str, BucketTable] = {
    "ASPECT_RATIO_256": ASPECT_RATIO_256,
    "ASPECT_RATIO_256_TEST": ASPECT_RATIO_256_TEST,
    "ASPECT_RATIO_512": ASPECT_RATIO_512,
    "ASPECT_RATIO_512_TEST": ASPECT_RATIO_512_TEST,
    "ASPECT_RATIO_1024": ASPECT_RATIO_1024,
    "ASPECT_RATIO_1024_TEST": ASPECT_RATIO_1024_TEST,
    "ASPECT_RATIO_2048": ASPECT_RATIO_2048,
    "ASPECT_RATIO_2048_TEST": ASPECT_RATIO_2048_TEST,
    "ASPECT_RATIO_2880": ASPECT_RATIO_2880,
    "ASPECT_RATIO_2880_TEST": ASPECT_RATIO_2880_TEST,
}


def aspect_ratio_table(name: str) -> BucketTable:
    """The bucket table of that name, {"0.25": (height, width), ...} in pixels.

    Raises ConfigError with the nearest valid name.
    """
    if name not in _TABLES:
        nearest = difflib.get_close_matches(name, _TABLES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"bucket table {name!r} (aspect_ratio_type) is unknown; did you mean {nearest!r}? One of "
            f"{', '.join(_TABLES)}"
        )
    return _TABLES[name]


def with_transposes(table: BucketTable) -> BucketTable:
    """The table with the sizes added whose transposed size alone it holds, ordered by ratio.

    In the tables of base 256 to 2048 that is one, 1344 x 704 (1.91) at base 1024: without it, pictures of that shape
    are cropped more than those on their side.
    """
    known = set(table.values())
    added = {
        str(round(width / height, 2)): (width, height)
        for height, width in table.values()
        if (width, height) not in known
    }
    return dict(sorted({**table, **added}.items(), key=lambda item: float(item[0])))


def closest_bucket(height: float, width: float, table: BucketTable, measure: Measure = "difference") -> str:
    """The key of `table` whose ratio is nearest to height / width (the first of two equally near).

    Args:
        measure: "difference" compares the keys by absolute difference, as the original did; "log" compares the sizes'
            own ratios by their quotient, so that a picture and the same on its side lie in transposed buckets.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"height={height} and width={width} must be positive")
    ratio = height / width
    if measure == "log":
        return min(table, key=lambda key: abs(math.log(table[key][0] / table[key][1] / ratio)))
    return min(table, key=lambda key: abs(float(key) - ratio))
