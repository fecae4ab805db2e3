"""Configs: every file loads and builds its model; every mistake is one line with the nearest valid name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion.config import TrainConfig, load_config
from diffusion.errors import ConfigError
from diffusion.training.building import model_options

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py"))
DEMO = ROOT / "configs/emoji/emoji_demo.py"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_and_builds_its_model(name: str) -> None:
    from diffusion.models import build_model

    config = load_config(ROOT / name)
    with torch.device("meta"):
        model = build_model(config.model, **model_options(config))
    assert model.config.input_size == config.image_size // 8
    assert TrainConfig.from_json(config.to_json()) == config


def test_values_of_the_original() -> None:
    config = load_config(ROOT / "configs/pixart_config/PixArt_xl2_img1024_internalms.py")
    assert (config.model, config.train_batch_size, config.lewei_scale) == ("PixArtMS_XL_2", 12, 2.0)
    assert (config.optimizer.lr, config.optimizer.eps, config.gradient_clip) == (2e-5, 1e-10, 0.01)
    assert (config.mixed_precision, config.ema_rate, config.scale_factor) == ("fp16", 0.9999, 0.18215)


def test_overrides_and_types() -> None:
    config = load_config(DEMO, ["optimizer.lr=1e-3", "validation.prompts=['x','y']", "auto_lr=None", "work_dir=abc"])
    assert config.optimizer.lr == 1e-3
    assert config.validation.prompts == ("x", "y")
    assert config.work_dir == "abc"
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_contradicting_keys() -> None:
    with pytest.raises(ConfigError, match="aspect_ratio_type"):
        load_config(DEMO, ["multi_scale=True"])
    with pytest.raises(ConfigError, match="contradicts"):
        load_config(DEMO, ["lewei_scale=1.0", "pe_interpolation=2.0"])


@pytest.mark.parametrize(
    "script",
    [
        "train_scripts/train.py",
        "tools/extract_features.py",
        "tools/check_data.py",
        "tools/feature_store.py",
        "scripts/inference.py",
        "train_scripts/train_vae.py",
    ],
)
def test_help_needs_no_torch(script: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        f"except SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
