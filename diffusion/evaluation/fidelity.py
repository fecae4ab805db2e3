"""FID and KID: how far the Inception features of drawn pictures lie from those of real ones.

Both compare two sets and need no pairs. FID is biased: it falls as the sets grow, so only figures from equal counts
compare; KID is not. Legend: N pictures, D features (2048).
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.checkpoints.download import file_sha256
from diffusion.errors import CheckpointError, ConfigError, DataError, first_line
from diffusion.images import IMAGE_SUFFIXES, decode_image, resize_and_crop
from diffusion.inference.recipe import library_versions, read_recipe

# TensorFlow's Inception of 2015, which published FIDs are measured with: other weights give other figures.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_FEATURES = "2048"
_USUAL_SUBSET_SIZE = 1000

Prepared = TypeVar("Prepared")


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D), float64, of features (N, D) with N > 1."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)} are not (N, D) with N > 1")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (FID, arXiv:1706.08500); means (D,), cov (D, D).

    The last trace is the sum of the singular values of F1^T F2 with C = F F^T. That takes symmetric matrices alone, and
    it is exact where a covariance is singular, as that of N <= D pictures is: the eigenvalues of the product C1 C2,
    the usual way, are off by 1e-5 there.
    """
    trace_of_root = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root)


def _factor(cov: Tensor) -> Tensor:
    """F (D, R) with F F^T = cov (D, D) of rank R."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(x: Tensor, y: Tensor, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (a.b / D + 1)^3 (KID, arXiv:1801.01401) of features (N, D) and (M, D).

    Returns:
        mean and standard deviation over `subsets` random subsets of `subset_size` rows of each.
    Raises:
        ConfigError: torch-fidelity is not installed.
    """
    if not 2 <= subset_size <= min(len(x), len(y)) or subsets < 1:
        raise ValueError(f"{subsets} subsets of {subset_size} cannot be drawn from {len(x)} and {len(y)} rows")
    _need_torch_fidelity()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    settings = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": seed, "verbose": False}
    result = kid_features_to_metric(x.double(), y.double(), **settings)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def find_inception_weights(weights: str | Path | None = None) -> Path:
    """The weights file given, or for None the one in torch.hub's folder, where torch-fidelity itself would put it.

    Raises:
        CheckpointError: it is not there; says what to fetch and where to put it. ConfigError: no torch-fidelity.
    """
    _need_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]) if weights is None else Path(weights)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no Inception weights there; fetch {url} (95 MB) and save it as this file, "
            "or give the path of yours with --weights"
        )
    return path


def load_inception(weights: Path, device: str | torch.device = "cpu") -> nn.Module:
    """torch-fidelity's InceptionV3, pictures (B, 3, H, W) uint8 -> ((B, 2048) float32,); frozen, in eval mode.

    Raises:
        CheckpointError: the file does not hold its weights. ConfigError: torch-fidelity is not installed.
    """
    _need_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    data = weights.read_bytes()
    try:
        # The library unpickles whatever the file holds; bytes that load here, under restrictions, run no code there.
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [_FEATURES], feature_extractor_weights_path=io.BytesIO(data)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{weights}: not the weights of torch-fidelity's InceptionV3 ({first_line(error)})"
        ) from error
    return network.to(device)


def inception_features(
    pictures: Sequence[str | Path | Image.Image], network: nn.Module, *, batch_size: int = 32, resize_px: int = 256
) -> Tensor:
    """Features of files or RGB pictures: (N, 2048) float64 on the CPU, the same at any batch size beyond rounding.

    Each picture is scaled to cover `resize_px` x `resize_px` and cut at the centre, with PIL's antialiased bicubic
    filter, without which FID measures the aliasing (arXiv:2104.11222). The network then takes it to 299 x 299 with the
    bilinear filter of TensorFlow 1, which is none at `resize_px` = 299.

    Args:
        network: from `load_inception`.
    Raises:
        DataError: names the picture that cannot be read.
    """

    def pixels(image: Image.Image) -> np.ndarray:
        return np.asarray(resize_and_crop(image, (resize_px, resize_px))[0])  # (H, W, 3) uint8

    device = next(network.parameters()).device
    features = []
    # TF32 keeps 10 bits after the point: figures of a CPU and a GPU would differ.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in picture_batches(pictures, batch_size, pixels):
            (rows,) = network(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(device))
            features.append(rows.double().cpu())
    return torch.cat(features)


def fidelity(
    generated: Sequence[Path],
    reference: Sequence[Path],
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    resize_px: int = 256,
    kid_subsets: int = 100,
    kid_subset_size: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """FID and KID of two sets of picture files, and all they depend on, ready for JSON. The order does not matter.

    Args:
        weights: file of the Inception weights; None = torch-fidelity's own place.
        resize_px: side that both sets are scaled and cut to first, see `inception_features`.
        kid_subset_size: None = 1000, or all of the smaller set when it has fewer.
        seed: of KID's subsets.
    Raises:
        ConfigError: torch-fidelity is missing, or a number is out of range. CheckpointError: no such weights.
        DataError: too few pictures, or one that cannot be read.
    """
    subset_size = _checked_subset_size(kid_subset_size, min(len(generated), len(reference)))
    for name, value in (("resize_px", resize_px), ("kid_subsets", kid_subsets)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    weights = find_inception_weights(weights)
    network = load_inception(weights, device)
    # KID's subsets are drawn by position.
    first, second = (
        inception_features(sorted(paths), network, batch_size=batch_size, resize_px=resize_px)
        for paths in (generated, reference)
    )
    kid_mean, kid_std = kernel_distance(first, second, kid_subsets, subset_size, seed)
    sha256 = file_sha256(weights)
    return {
        "fid": frechet_distance(*gaussian_statistics(first), *gaussian_statistics(second)),
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        "kid_subsets": kid_subsets,
        "kid_subset_size": subset_size,
        "kid_seed": seed,
        "num_generated": len(generated),
        "num_reference": len(reference),
        "resize_px": resize_px,
        "resize": f"cover and centre crop to {resize_px}x{resize_px} px, PIL antialiased bicubic",
        "weights": str(weights),
        "weights_sha256": sha256,
        "weights_as_published": sha256 == INCEPTION_SHA256,
        "sampling": _sampling(sorted(generated)),
        "device": str(device),
        "versions": _versions(),
    }


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures directly in a folder, by name.

    Raises:
        DataError: no such folder, no pictures, or a sheet of all pictures (`grid.png`) among them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a folder of pictures is expected here")
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise DataError(f"{folder}: no pictures directly in this folder ({', '.join(IMAGE_SUFFIXES)})")
    if (folder / "grid.png") in files:
        raise DataError(f"{folder / 'grid.png'}: a sheet of pictures would count as one; move it elsewhere")
    return files


def picture_batches(
    pictures: Sequence[str | Path | Image.Image], batch_size: int, prepare: Callable[[Image.Image], Prepared]
) -> Iterator[list[Prepared]]:
    """`prepare(picture)` for `batch_size` RGB pictures at a time, decoded by threads, with a bar on terminals.

    Raises:
        DataError: names the picture that cannot be read. ConfigError: batch_size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} must be at least 1")

    def prepared(picture: str | Path | Image.Image) -> Prepared:
        image = picture if isinstance(picture, Image.Image) else decode_image(picture)
        if image.mode != "RGB":
            raise ValueError(f"mode {image.mode} is not RGB; decode pictures with decode_image")
        return prepare(image)

    # Decoders set warning filters, which all threads share: without the outer guard one could leave its own behind.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(pictures), batch_size), unit="batch", disable=None, leave=False):
            yield list(pool.map(prepared, pictures[start : start + batch_size]))


def shared_entries(recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all recipes say alike: solver, steps, guidance, model; prompts and seeds differ and fall out."""
    first, *others = recipes
    return {key: value for key, value in first.items() if all(recipe.get(key) == value for recipe in others)}


def _checked_subset_size(wanted: int | None, num_pictures: int) -> int:
    """Pictures in a subset of KID's, when the smaller set has `num_pictures`."""
    if num_pictures < 2:
        raise DataError(f"one of the sets has {num_pictures} pictures; FID and KID need 2, and mean little below 1000")
    size = min(_USUAL_SUBSET_SIZE, num_pictures) if wanted is None else wanted
    if not 2 <= size <= num_pictures:
        raise ConfigError(f"kid_subset_size={size} must be 2 to {num_pictures}, the count of the smaller set")
    return size


def _sampling(pictures: Sequence[Path]) -> dict[str, Any] | None:
    """How all of these pictures were drawn, as far as they agree; None when one carries no recipe."""
    try:
        return shared_entries([read_recipe(picture) for picture in pictures])
    except DataError:
        return None


def _need_torch_fidelity() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"FID and KID need torch-fidelity ({error}); install it with `pip install -e '.[eval]'`"
        ) from error


def _versions() -> dict[str, str]:
    import torch_fidelity

    modules = {"torch-fidelity": torch_fidelity, "numpy": np, "pillow": PIL}
    return {**library_versions(), **{name: str(module.__version__) for name, module in modules.items()}}
