"""What a ControlNet follows, beside each picture: edges that are computed, or pictures that are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.checkpoints import load_hed
from diffusion.checkpoints.download import OUTPUT_DIR
from diffusion.errors import DataError
from diffusion.features.fingerprint import hash_files
from diffusion.images import IMAGE_SUFFIXES, canny_edges, decode_image, detect_edges, to_pil, to_tensor

DETECTORS = ("canny", "hed")
DEFAULT_HED = Path(OUTPUT_DIR) / "ControlNetHED.pth"
Detector = Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1] -> the same


def load_detector(condition: str | None, hed_path: str | Path, device: torch.device) -> Detector | None:
    """The function that makes condition pictures; None = there is no condition, or it is a folder of pictures.

    Raises:
        CheckpointError: no HED weights at `hed_path`; says where they belong.
    """
    if condition == "canny":
        return canny_edges
    return partial(detect_edges, load_hed(hed_path, device=device)) if condition == "hed" else None


def condition_fingerprint(condition: str | None, hed_path: str | Path) -> dict[str, Any]:
    """What of a condition determines the features; nothing without one, so that other stores keep their fingerprint.

    Raises:
        DataError: neither a detector nor a folder. CheckpointError: no HED weights.
    """
    if condition is None:
        return {}
    if condition == "hed":
        load_hed(hed_path)  # explains what is missing before anything is encoded
        return {"condition": "hed", "hed": hash_files([Path(hed_path)])}
    if condition not in DETECTORS and not Path(condition).is_dir():
        raise DataError(f"--condition {condition} is neither {' nor '.join(DETECTORS)} nor a folder of pictures")
    return {"condition": condition if condition in DETECTORS else "pictures"}


def read_condition(folder: Path | None, key: str, size: tuple[int, int]) -> Image.Image | None:
    """The condition picture of a sample: the file of its name below `folder`, with any suffix; None without folder.

    Args:
        size: (width, height) of the sample's picture.
    Raises:
        DataError: there is none, it is unreadable, or its size is another.
    """
    if folder is None:
        return None
    stem = (folder / key).with_suffix("")
    candidates = [folder / key, *(stem.with_name(f"{stem.name}{suffix}") for suffix in sorted(IMAGE_SUFFIXES))]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder / key}: no condition picture of that name, with any suffix")
    image = decode_image(path)
    if image.size != size:
        raise DataError(
            f"{path}: the condition has {image.width}x{image.height} px, its picture {size[0]}x{size[1]}; "
            "make them alike"
        )
    return image


def write_edges(picture: str | Path, output: Path, detector: str, hed_path: str | Path) -> Path:
    """Edges of a picture file, at its size, as a PNG; returns its path.

    Raises:
        DataError: the picture is unreadable. CheckpointError: no HED weights.
    """
    find = load_detector(detector, hed_path, torch.device("cpu"))
    assert find is not None  # the program offers detectors alone
    edges = to_pil(find(to_tensor(decode_image(picture))[None])[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    edges.save(output)
    return output
