"""What the tests of the house share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This repository with an output folder of its own."""
    for path in ROOT.iterdir():
        if path.name not in ("output", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output/pretrained_models").symlink_to(ROOT / "output/pretrained_models")
    return tmp_path
