"""The wheel holds the package alone and works by itself; the lock file fits what pyproject.toml asks for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "output/pretrained_models/emoji-256"
DRAW = """
import sys
from pathlib import Path
import diffusion
from diffusion.inference import PixArtPipeline

assert Path(diffusion.__file__).is_relative_to(sys.argv[1]), diffusion.__file__
pipe = PixArtPipeline.from_pretrained(sys.argv[2])
pipe("red apple", num_inference_steps=2, seed=0).images[0].save(sys.argv[3])
"""


def lock() -> str:
    return (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")


def test_the_lock_file_holds_hashes_and_no_places() -> None:
    text = lock()
    pins = re.findall(r"^[\w.-]+(?:\[[\w,-]+\])?==[^\n]*(?:\n    --hash=sha256:[0-9a-f]{64}[^\n]*)+", text, flags=re.M)
    assert len(pins) == len(re.findall(r"^[\w.-]+", text, flags=re.M)) > 50  # every package has hashes
    assert not re.search(r"://|file:|--index|--find-links| @ |\+cpu|\+cu\d|/opt/|/home/|/root/|/tmp/", text)


def test_the_lock_file_fits_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", lock(), flags=re.M):
        pinned.setdefault(name.lower().replace("_", "-"), set()).add(version)
    for requirement in map(Requirement, project["dependencies"]):
        versions = pinned.get(requirement.name.lower().replace("_", "-"), set())
        assert versions, f"{requirement.name} is not locked; the command is in CONTRIBUTING.md"
        assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_draws_by_itself(tmp_path: Path) -> None:
    """Built, installed into a folder of its own beside the packages of this environment, and used from elsewhere."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a clean tree: setuptools leaves build/ beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "diffusion", "tools", "configs", "tests"):
        (source / name).symlink_to(ROOT / name)
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", tmp_path, source], check=True, timeout=500)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"diffusion", f"{wheel.name.split('-py3')[0]}.dist-info"}
    packaged = {name for name in names if name.startswith("diffusion/") and name.endswith(".py")}
    assert packaged == {str(path.relative_to(ROOT)) for path in (ROOT / "diffusion").rglob("*.py")}

    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=500)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", DRAW, tmp_path / "site", BUNDLED, tmp_path / "apple.png"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(command, cwd=elsewhere, env=environment, check=True, timeout=300)
    assert (tmp_path / "apple.png").stat().st_size > 1000
