from __future__ import annotations

from pathlib import Path

import pytest

from diffusion.inference import PixArtPipeline, make_scheduler
from tests.inference.tiny_pipeline import load_quietly, write_tiny_pipeline


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("inference") / "tiny")


@pytest.fixture(scope="session")
def _loaded(pipeline_folder: Path) -> PixArtPipeline:
    return load_quietly(pipeline_folder)


@pytest.fixture
def pipeline(_loaded: PixArtPipeline) -> PixArtPipeline:
    """The tiny pipeline with a fresh DPM-Solver; loaded once a session."""
    _loaded.scheduler = make_scheduler("dpm-solver")
    return _loaded
