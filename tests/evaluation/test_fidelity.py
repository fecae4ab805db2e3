"""FID and KID against closed forms, brute force and scipy, and a whole run through a real InceptionV3."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from diffusion.checkpoints.download import file_sha256
from diffusion.errors import CheckpointError, ConfigError, DataError
from diffusion.evaluation.fidelity import (
    INCEPTION_SHA256,
    fidelity,
    find_inception_weights,
    frechet_distance,
    gaussian_statistics,
    inception_features,
    kernel_distance,
    load_inception,
    picture_files,
)
from diffusion.inference import save_png

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs/evaluation.md"
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# The Frechet distance


@pytest.mark.parametrize("rotated", [False, True])
def test_frechet_distance_of_gaussians_with_common_axes(rotated: bool) -> None:
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 1.0, 0.0, 3.5]).double()
    deviations1, deviations2 = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 0.1, 0.5, 4.0]).double()
    expected = float((mean1 - mean2).square().sum() + (deviations1 - deviations2).square().sum())
    axes = torch.linalg.qr(randn(4, 4)).Q if rotated else torch.eye(4).double()
    cov1, cov2 = (axes @ torch.diag(deviations**2) @ axes.T for deviations in (deviations1, deviations2))
    assert frechet_distance(axes @ mean1, cov1, axes @ mean2, cov2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_against_the_matrix_root_and_torch_fidelity() -> None:
    first, second = gaussian_statistics(randn(200, 16)), gaussian_statistics(randn(300, 16, seed=1) @ randn(16, 16))
    mean1, cov1, mean2, cov2 = (tensor.numpy() for tensor in (*first, *second))
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    library = fid_statistics_to_metric({"mu": mean1, "sigma": cov1}, {"mu": mean2, "sigma": cov2}, verbose=False)
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*first, *second) == pytest.approx(library[KEY_METRIC_FID], rel=1e-9)
    assert frechet_distance(*second, *first) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rows", [10, 400])  # fewer and more than the 32 features
def test_equal_sets_have_distance_zero(rows: int) -> None:
    statistics = gaussian_statistics(randn(rows, 32).relu())
    assert frechet_distance(*statistics, *statistics) == pytest.approx(0, abs=1e-11)


def test_singular_covariances_are_exact() -> None:
    x, y = randn(6, 64), randn(9, 64, seed=1)
    assert frechet_distance(*gaussian_statistics(x), *gaussian_statistics(y)) == pytest.approx(
        frechet_distance_of_few(x, y), rel=1e-12
    )


def frechet_distance_of_few(x: Tensor, y: Tensor) -> float:
    """The same distance without covariances, from the N x M products of the centred rows."""
    a, b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (x, y))
    trace_of_root = torch.linalg.matrix_norm(a @ b.T, "nuc")
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * trace_of_root)


def test_samples_approach_the_distance_of_their_distributions() -> None:
    x, y = randn(40_000, 3), 2 * randn(40_000, 3, seed=1) + 1
    assert frechet_distance(*gaussian_statistics(x), *gaussian_statistics(y)) == pytest.approx(3 + 3, rel=0.02)


def test_gaussian_statistics() -> None:
    features = randn(50, 5).float()
    mean, cov = gaussian_statistics(features)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)
    for one, other in zip(gaussian_statistics(features.flip(0)), (mean, cov)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"\(1, 5\)"):
        gaussian_statistics(features[:1])


# The kernel distance


def test_kernel_distance_is_its_definition() -> None:
    x, y = randn(5, 3), randn(5, 3, seed=1) + 1

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    within = [kernel(rows[i], rows[j]) / 20 for rows in (x, y) for i in range(5) for j in range(5) if i != j]
    across = [kernel(a, b) / 25 for a in x for b in y]
    mean, deviation = kernel_distance(x, y, 3, 5, 0)
    assert mean == pytest.approx(sum(within) - 2 * sum(across), rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-12)  # every subset is the whole set


def test_kernel_distance_of_centred_gaussians() -> None:
    # Odd moments vanish, so of (a.b / D + 1)^3 only 1 + 3 (a.b)^2 / D^2 counts, whose mean is 1 + 3 tr(C1 C2) / D^2.
    cov1, cov2 = torch.diag(torch.tensor([1.0, 4.0])).double(), torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    expected = 3 / 4 * float((cov1 - cov2).square().sum())
    x, y = randn(20_000, 2) @ torch.linalg.cholesky(cov1).T, randn(20_000, 2, seed=1) @ torch.linalg.cholesky(cov2).T
    mean, _ = kernel_distance(x, y, 200, 200, 0)
    assert mean == pytest.approx(expected, rel=0.05)


def test_kernel_distance_is_unbiased_and_repeatable() -> None:
    x, y = randn(4000, 8), randn(4000, 8, seed=1)
    mean, deviation = kernel_distance(x, y, 100, 100, 0)
    assert abs(mean) < 3 * deviation / 100**0.5
    assert kernel_distance(x, y, 100, 100, 0) == (mean, deviation)
    assert kernel_distance(x, y, 100, 100, 1) != (mean, deviation)
    with pytest.raises(ValueError, match="2 subsets of 4001"):
        kernel_distance(x, y, 2, 4001, 0)


# Weights


def test_missing_weights_name_their_source_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / WEIGHTS_NAME
    with pytest.raises(CheckpointError, match=f"^{place}: .* fetch https://.*/{WEIGHTS_NAME} .*--weights"):
        find_inception_weights()
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'x.pth'}: .* fetch https://"):
        find_inception_weights(tmp_path / "x.pth")
    place.parent.mkdir()
    place.touch()
    assert find_inception_weights() == place


def test_other_files_are_no_weights(tmp_path: Path) -> None:
    damaged, other = tmp_path / "damaged.pth", tmp_path / "other.pth"
    damaged.write_bytes(b"no archive")
    torch.save({"weight": torch.ones(2)}, other)
    for path in (damaged, other):
        with pytest.raises(CheckpointError, match=f"^{path}: not the weights"):
            load_inception(path)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("trapped",)


def test_code_in_a_weights_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, "trap.pth")
    with pytest.raises(CheckpointError, match="trap.pth"):
        load_inception(Path("trap.pth"))
    assert not Path("trapped").exists()


def test_without_the_extra_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for call in (find_inception_weights, lambda: kernel_distance(randn(4, 2), randn(4, 2), 1, 4, 0)):
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[eval\]'"):
            call()


# Pictures


class MeanColour(nn.Module):
    """In Inception's place: (B, 3, H, W) uint8 -> the sizes and mean colours, (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        assert pixels.dtype == torch.uint8
        sizes = pixels.new_tensor(pixels.shape[2:]).expand(len(pixels), 2)
        return (torch.cat([sizes.float(), pixels.float().mean((2, 3))], 1),)


def write_pictures(folder: Path, count: int, seed: int, size_px: int = 64) -> list[Path]:
    """Smooth random pictures; returns their paths."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    paths = [folder / f"{index:02d}.png" for index in range(count)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((size_px, size_px), Image.Resampling.BICUBIC).save(path)
    return paths


def test_features_are_of_the_centre_at_the_stated_size_in_order() -> None:
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("lime", (24, 0, 72, 32))
    features = inception_features([Image.new("RGB", (8, 8), "blue"), wide], MeanColour(), batch_size=1, resize_px=16)
    assert features.dtype == torch.float64
    assert features.tolist() == [[16, 16, 0, 0, 255], [16, 16, 0, 255, 0]]


def test_features_of_files_and_pictures_agree_at_any_batch_size(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "a", 5, seed=0)
    features = inception_features(paths, MeanColour(), batch_size=2, resize_px=32)
    pictures = [Image.open(path) for path in paths]
    assert torch.equal(inception_features(pictures, MeanColour(), batch_size=5, resize_px=32), features)


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "a", 3, seed=0)
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    with pytest.raises(DataError, match=f"^{paths[1]}: "):
        inception_features(paths, MeanColour())
    with pytest.raises(DataError, match="none.png: no such picture"):
        inception_features([tmp_path / "none.png"], MeanColour())


def test_picture_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".tmp-1.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in picture_files(tmp_path)] == ["a.jpg", "b.PNG"]
    (tmp_path / "grid.png").touch()
    with pytest.raises(DataError, match="grid.png: a sheet"):
        picture_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        picture_files(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        picture_files(tmp_path / "absent")


def test_prompts_file_of_the_documentation(tmp_path: Path) -> None:
    block = re.search(r"^```python\n(.*?)^```", DOCUMENTATION.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    notes = [{"image_id": image, "id": 10 - image, "caption": f"first of\n{image} "} for image in range(5)]
    notes += [{"image_id": image, "id": 20, "caption": "second"} for image in range(5)]
    folder = tmp_path / "data/coco/annotations"
    folder.mkdir(parents=True)
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": notes}), encoding="utf-8")
    subprocess.run([sys.executable, "-c", block[1]], cwd=tmp_path, check=True)
    prompts = (tmp_path / "data/coco/prompts-30k.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(prompts) == [f"first of {image}" for image in range(5)]
    assert prompts != sorted(prompts)


# A whole run


class Untrained(FeatureExtractorInceptionV3):
    """InceptionV3 without a file of weights."""

    def load_state_dict(self, *_: object) -> None:  # type: ignore[override]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # PyTorch's own initial weights let the signal die out
                nn.init.kaiming_normal_(module.weight, generator=generator())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(Untrained("untrained", ["2048"], feature_extractor_weights_path=empty).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    root = tmp_path_factory.mktemp("sets")
    return write_pictures(root / "generated", 3, seed=0), write_pictures(root / "reference", 4, seed=1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share busy cores wait for each other inside LAPACK, many times longer than the work takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_report_of_a_whole_run(weights: Path, sets: tuple[list[Path], list[Path]]) -> None:
    report = fidelity(sets[0][::-1], sets[1][::-1], weights=weights, batch_size=2, resize_px=64, kid_subset_size=2)
    network = load_inception(weights)
    by_hand = []
    for paths in sets:
        pixels = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in paths]))
        by_hand.append(network(pixels.permute(0, 3, 1, 2))[0].double())
    assert report["fid"] == pytest.approx(frechet_distance_of_few(*by_hand), rel=1e-4)
    expected = kernel_distance(*by_hand, subsets=100, subset_size=2, seed=0)
    assert (report["kid_mean"], report["kid_std"]) == pytest.approx(expected, rel=1e-3)
    assert report["fid"] > 0.1
    assert (report["num_generated"], report["num_reference"]) == (3, 4)
    assert report["weights_sha256"] == file_sha256(weights) != INCEPTION_SHA256
    assert report["weights_as_published"] is False
    assert report["resize"] == "cover and centre crop to 64x64 px, PIL antialiased bicubic"
    assert report["sampling"] is None
    assert {"torch", "torch-fidelity", "pillow"} <= report["versions"].keys()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_report_says_how_the_pictures_were_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[list[Path], list[Path]]
) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setattr("diffusion.evaluation.fidelity.load_inception", lambda *_: MeanColour())
    for index in range(3):
        recipe = {"prompt": f"prompt {index}", "seed": index, "steps": 20, "guidance_scale": 4.5}
        save_png(Image.new("RGB", (8, 8), (80 * index, 0, 9)), tmp_path / f"{index}.png", recipe)
    report = fidelity(picture_files(tmp_path), sets[1], weights=weights, resize_px=8)
    assert report["sampling"] == {"steps": 20, "guidance_scale": 4.5}
    assert report["kid_subset_size"] == 3


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    with pytest.raises(DataError, match="1 pictures"):
        fidelity(paths, paths[:1])
    with pytest.raises(ConfigError, match="kid_subset_size=4 must be 2 to 3"):
        fidelity(paths, paths, kid_subset_size=4)
    with pytest.raises(ConfigError, match="resize_px=0"):
        fidelity(paths, paths, resize_px=0)
    with pytest.raises(ConfigError, match="batch size 0"):
        inception_features(paths, MeanColour(), batch_size=0)
