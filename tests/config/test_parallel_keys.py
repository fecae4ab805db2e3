"""Keys of many processes: what old configs mean, and combinations that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion.config import TrainConfig, load_config
from diffusion.errors import ConfigError


def load(tmp_path: Path, *options: str) -> TrainConfig:
    path = tmp_path / "config.py"
    path.write_text("data = dict(type='Store', root='/nowhere')\n")
    return load_config(path, options, notify=lambda line: None)


def test_old_configs_keep_their_meaning(tmp_path: Path) -> None:
    assert load(tmp_path).strategy == "ddp"
    assert load(tmp_path, "use_fsdp=True").strategy == "full_shard"
    assert load(tmp_path, "use_fsdp=True", "parallel.strategy='shard_grad_op'").strategy == "shard_grad_op"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["use_fsdp=True", "parallel.strategy='ddp'"], "use_fsdp=True contradicts"),
        (["use_fsdp=True", "optimizer.type='Muon'"], "optimizer.type 'Muon' needs whole matrices"),
        (["parallel.strategy='hybrid'"], "did you mean 'hybrid_shard'"),
        (["parallel.shard_size=2"], "parallel.shard_size=2 is read by strategy='hybrid_shard' only"),
        (["grad_checkpointing_args.every=2"], "grad_checkpointing_args"),
        (["compile=True", "grad_checkpointing=True", "grad_checkpointing_args.policy='selective'"], "compile=True"),
        (["health.max_skipped_in_a_row=0"], "health.max_skipped_in_a_row=0 must be"),
    ],
)
def test_what_cannot_work_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *options)
