from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from tests.inference.test_control import DEPTH, write_control
from tests.inference.tiny_pipeline import tiny_transformer, write_tiny_pipeline
from tests.web.serving import Served, make_engine, row, run_served, served


@pytest.fixture(scope="package", autouse=True)
def _threads_and_uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("client"))  # gradio_client leaves folders
    yield
    tempfile.tempdir = before
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("web") / "tiny", depth=DEPTH)


@pytest.fixture(scope="package")
def control_file(tiny_model: Path) -> Path:
    return write_control(tiny_transformer(depth=DEPTH), tiny_model / "control.pth")


@pytest.fixture(scope="package")
def site(tiny_model: Path, control_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page with a tiny model and a ControlNet."""
    with served(make_engine(tiny_model, tmp_path_factory.mktemp("pictures"), control_file)) as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "emoji"
    (folder / "validation").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(row(step) for step in range(1, 2001)))
    (folder / "config.json").write_text(json.dumps({"max_steps": 4000, "model": "PixArt_Ti_2"}))
    for step in (0, 1000, 200):
        Image.new("RGB", (4, 4)).save(folder / f"validation/step_{step:07d}.png")
    return folder


@pytest.fixture
def address(run: Path) -> Iterator[str]:
    with run_served(run) as served_at:
        yield served_at
