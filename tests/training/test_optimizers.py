"""Optimisers and schedules beside those of test_options.py: 8-bit moments, weight decay by name, warm-up."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.config import load_config
from diffusion.errors import ConfigError
from diffusion.training import build_network
from diffusion.training.muon import muon, orthogonalised
from diffusion.training.optimization import build_optimizer, lr_factor, parameter_groups, scaled_learning_rate
from tests.training.test_options import with_optimizer
from tests.training.tiny_run import curve, run

SIZE = ["hidden_size=64", "depth=1", "num_heads=2"]


def test_weight_decay_by_name(config_file: Path) -> None:
    network = build_network(load_config(config_file, SIZE))
    patterns = {"*.mlp.*": 0.5, "blocks.*": 0.25, "*scale_shift_table": 0.125}
    groups = parameter_groups(network, 0.01, patterns)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert sorted(found) == sorted(names.values())
    assert found["blocks.0.mlp.fc1.bias"] == 0.5  # the first pattern that matches
    assert found["blocks.0.attn.qkv.weight"] == found["blocks.0.scale_shift_table"] == 0.25
    assert found["final_layer.scale_shift_table"] == 0.125
    assert found["t_block.1.weight"] == 0.01  # the rule for all others
    assert found["t_block.1.bias"] == 0.0
    with pytest.raises(ConfigError, match=r"weight_decay_patterns: '\*.attention.\*' matches no weight"):
        parameter_groups(network, 0.01, {"*.attention.*": 0.1})
    chosen = load_config(config_file, [*SIZE, "optimizer.weight_decay_patterns={'*': 0.03}"])
    assert {group["weight_decay"] for group in build_optimizer(network, chosen, 4).param_groups} == {0.03}


def test_without_patterns_the_groups_are_what_they_were(config_file: Path) -> None:
    network = build_network(load_config(config_file, SIZE))
    matrices, others = parameter_groups(network, 0.0)
    tables = {id(p) for name, p in network.named_parameters() if name.endswith("scale_shift_table")}
    expected = [p for p in network.parameters() if p.ndim > 1 and id(p) not in tables]
    assert [id(p) for p in matrices["params"]] == [id(p) for p in expected]
    assert {id(p) for p in others["params"]} == {id(p) for p in network.parameters()} - {id(p) for p in expected}


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_singular_values_of_an_update_are_about_one(shape: tuple[int, int]) -> None:
    matrices = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]
    )
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalised(matrices)
    assert found.dtype == torch.float32  # on a CPU
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    assert (found * (u @ v)).sum((1, 2)).min() > 0.9 * found.norm(dim=(1, 2)).max() * math.sqrt(min(shape))
    assert not orthogonalised(torch.zeros(1, *shape)).any()


def test_muon_takes_the_steps_of_a_kept_library() -> None:
    """Tall and wide matrices, kernels, vectors; three steps, the learning rate falling."""
    from pytorch_optimizer import Muon

    def train(ours: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        inside = [torch.nn.Linear(8, 24), torch.nn.Linear(24, 8), torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(8, 24)]
        network = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(inside), "head": torch.nn.Linear(5, 3)})
        groups = parameter_groups(network, 0.1)
        if ours:
            optimizer = muon(network, groups, 1e-2, "blocks.", momentum=0.9, betas=(0.8, 0.95), eps=1e-8)
        else:
            split = muon(network, groups, 1e-2, "blocks.", eps=1e-8).param_groups
            kept = [{key: group[key] for key in ("params", "weight_decay", "use_muon")} for group in split]
            optimizer = Muon(
                kept,
                lr=1e-2,
                momentum=0.9,
                use_adjusted_lr=True,
                adamw_lr=1e-2,
                adamw_betas=(0.8, 0.95),
                adamw_eps=1e-8,
            )
        noise = torch.Generator().manual_seed(1)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        for step in range(3):
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=noise)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        return [parameter.detach() - old for parameter, old in zip(network.parameters(), before, strict=True)]

    for found, expected in zip(train(True), train(False), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()  # bfloat16 within the iteration


def test_8_bit_needs_a_library(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(with_optimizer(config_file, "type='AdamW8bit', lr=1e-3, betas=(0.9, 0.99)"), SIZE)
    real = importlib.util.find_spec
    hidden = ("torchao", "bitsandbytes")
    monkeypatch.setattr("diffusion.training.low_bit.find_spec", lambda name: None if name in hidden else real(name))
    with pytest.raises(ConfigError, match=r"needs torchao \(pip install 'pixart\[lowbit\]'\) or bitsandbytes"):
        build_optimizer(build_network(config), config, 4)


@pytest.mark.slow
def test_8_bit_moments_learn_and_resume_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.optim.subclass_8bit import OptimState8bit

    with_optimizer(config_file, "type='AdamW8bit', lr=2e-3, weight_decay=0.01")
    options = [*SIZE, "max_steps=12", "save_model_steps=6", "ema_rate=None"]
    whole = run(load_config(config_file, options), tmp_path / "whole")
    state = whole.state.optimizer.state.values()
    eight = [entry for entry in state if isinstance(entry["exp_avg"], OptimState8bit)]
    assert len(eight) >= 8  # every matrix of 4096 numbers or more
    losses = list(curve(tmp_path / "whole").values())
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    run(load_config(config_file, [*options, "max_steps=6"]), tmp_path / "cut")
    resumed = run(load_config(config_file, options), tmp_path / "cut", resume_from="latest")
    expected = whole.state.network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.state.network.state_dict().items())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 16)), 0.5 * (1 + math.cos(math.pi / 8))]),
        ("cosine_decay_to_constant", [0.25, 0.5, 0.75, 1.0, 1.0, None, None]),
    ],
)
def test_warm_up_counts_optimiser_steps(schedule: str, expected: list[float | None], config_file: Path) -> None:
    options = [f"lr_schedule={schedule}", "lr_schedule_args.num_warmup_steps=4", "gradient_accumulation_steps=2"]
    factor = lr_factor(load_config(config_file, options), total_steps=20)
    for step, value in enumerate(expected):
        assert value is None or factor(step) == pytest.approx(value)
    assert factor(20) == pytest.approx({"constant": 1.0, "cosine": 0.0}.get(schedule, 0.1))


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate_follows_the_global_batch(rule: str, factor: float, config_file: Path) -> None:
    config = load_config(config_file, [f"auto_lr={{'rule': '{rule}'}}", "optimizer.lr=1e-4"])
    assert scaled_learning_rate(config, 1024) == pytest.approx(factor * 1e-4)
