"""Runs of the tiny configs of this folder, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusion.config import TrainConfig
from diffusion.training import Reporting, Trainer, denoising_objective

ROOT = Path(__file__).resolve().parents[2]


def write_config(path: Path, parts: Path) -> Path:
    """Six steps of batch 4 on the store of the fixture `parts`, of a network of two narrow blocks."""
    path.write_text(
        "data_root = '/'\n"
        f"data = dict(type='Store', root={str(parts / 'store')!r}, split='train')\n"
        "image_size = 32\nmodel = 'PixArt_Ti_2'\nhidden_size = 32\ndepth = 2\nnum_heads = 2\n"
        "caption_channels = 32\nnull_caption = 't5_empty'\n"
        f"pipeline_load_from = {str(parts / 'pipe')!r}\n"
        "train_batch_size = 4\nnum_workers = 0\nmax_steps = 6\nlog_interval = 1\nsave_model_steps = 3\n"
        "save_model_epochs = None\nmixed_precision = 'no'\ndeterministic = True\nauto_lr = None\nema_rate = 0.9\n"
        "optimizer = dict(lr=1e-3, eps=1e-8)\nlr_schedule_args = dict(num_warmup_steps=2)\n"
        "validation = dict(every_steps=100, at_start=False, num_samples=4)\n"
    )
    return path


def run(config: TrainConfig, work_dir: Path, **options: object) -> Trainer:
    torch.set_num_threads(1)
    trainer = Trainer(config, denoising_objective, work_dir, reporting=Reporting(tensorboard=False), **options)  # type: ignore[arg-type]
    trainer.fit()
    return trainer


def curve(work_dir: Path, key: str = "loss") -> dict[int, float]:
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def weights(work_dir: Path, step: int, name: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(work_dir / "checkpoints" / f"checkpoint-{step}" / name / "diffusion_pytorch_model.safetensors")
