from __future__ import annotations

from pathlib import Path

import pytest

from diffusion.checkpoints import save_transformer
from diffusion.features import ExtractionSettings, extract_folder
from diffusion.inference import make_scheduler
from diffusion.models import PixArt
from tests.tiny import write_tiny_pipeline_parts
from tests.training.tiny_run import ROOT, write_config


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline folder and a store of 40 bundled pictures at 32 px."""
    root = tmp_path_factory.mktemp("parts")
    write_tiny_pipeline_parts(root / "pipe")
    make_scheduler("dpm-solver").save_pretrained(root / "pipe" / "scheduler")
    save_transformer(PixArt(hidden_size=32, num_heads=2, depth=1, caption_channels=32), root / "pipe" / "transformer")
    extract_folder(
        ROOT / "data/emoji", root / "store", root / "pipe", ExtractionSettings(image_size=32, dtype="fp32"), limit=40
    )
    return root


@pytest.fixture
def config_file(parts: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.py", parts)
