"""Passes recorded as CUDA graphs train as launched ones do, whatever their shapes and families.

Without a card a recording is its function, called again on fixed buffers: copies and gradients are tested all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion.adapters import adapters_off, start_lora
from diffusion.config import TrainConfig, load_config
from diffusion.data import TrainBatch
from diffusion.errors import ConfigError
from diffusion.models import ControlPixArt, PixArt
from diffusion.objectives import (
    ConsistencyObjective,
    ControlObjective,
    DenoisingObjective,
    DistributionMatching,
    OneStepNetworks,
    Roles,
)
from diffusion.objectives.levers import Routing
from diffusion.process import IDDPM
from diffusion.training import Trainer
from diffusion.training.recorded_passes import RecordedPasses
from tests.training.test_fast_step import build, many_sizes
from tests.training.tiny_run import curve, run, weights

__all__ = ["many_sizes"]  # a fixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def recorded(config: TrainConfig, **keys: Any) -> TrainConfig:
    return config.model_copy(update={"compile": False, "cuda_graph": True, **keys})


def launch_all(trainer: Trainer) -> Trainer:
    """Have a trainer record nothing; its captions are padded as if it did."""
    trainer.objective.choices = lambda batch: None  # type: ignore[method-assign]
    return trainer


def losses(trainer: Trainer, count: int) -> list[float]:
    """Of the next `count` steps."""
    trainer._base_lr, trainer._factor, trainer.first_step = 1e-3, lambda step: 1.0, 0
    batches = trainer._micro_batches()
    return [trainer._train_step(batches, trainer.window).loss.item() for _ in range(count)]


def values_of(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().cpu() for parameter in trainer.state.network.parameters()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_of_many_shapes_train_to_the_same_bits(
    accumulation: int, many_sizes: TrainConfig, tmp_path: Path
) -> None:
    config = recorded(many_sizes, gradient_accumulation_steps=accumulation, deterministic=True)
    trainer = build(config, tmp_path / "recorded")
    plain = launch_all(build(config, tmp_path / "launched"))
    assert losses(trainer, 16) == losses(plain, 16)
    assert trainer.passes.num_recorded == 3 and plain.passes.num_recorded == 0
    assert all(map(torch.equal, values_of(trainer), values_of(plain)))
    usual = build(config.model_copy(update={"cuda_graph": False}), tmp_path / "usual")
    torch.testing.assert_close(losses(usual, 16), losses(build(config, tmp_path / "again"), 16), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["grad_checkpointing=True"],
        ["grad_checkpointing=True", "grad_checkpointing_args.policy=selective"],
        ["mixed_precision=bf16", "kernels.text=packed", "kernels.bf16_stream=True"],
        ["mixed_precision=fp16"],
        ["lora={'rank': 2}"],
    ],
    ids=" ".join,
)
def test_a_run_of_a_config_writes_the_same_weights(
    options: list[str], config_file: Path, parts: Path, tmp_path: Path
) -> None:
    options = [*options, f"load_from={parts / 'pipe'}", "depth=1"]
    trainer = run(load_config(config_file, [*options, "cuda_graph=True"]), tmp_path / "recorded")
    run(load_config(config_file, options), tmp_path / "launched")
    assert trainer.passes.num_recorded == 1
    bits = "mixed_precision" not in " ".join(options)  # padded captions round otherwise
    torch.testing.assert_close(
        curve(tmp_path / "recorded"), curve(tmp_path / "launched"), rtol=1e-5 if bits else 2e-2, atol=1e-6
    )


def test_a_resumed_run_goes_on_to_the_same_bits(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["cuda_graph=True"])
    run(config, tmp_path / "whole")
    run(config.model_copy(update={"max_steps": 3}), tmp_path / "parts")
    run(config, tmp_path / "parts", resume_from="latest")
    whole, resumed = (weights(tmp_path / name, 6) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_not_finite_skips_its_step(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "nan@step=4")
    trainer = run(load_config(config_file, ["cuda_graph=True"]), tmp_path / "run")
    assert (trainer.state.step, trainer.state.skipped_steps) == (6, 1)


def test_several_processes_are_refused(config_file: Path) -> None:
    config = load_config(config_file, ["cuda_graph=True"])
    two: Any = SimpleNamespace(config=config, ranks=SimpleNamespace(world_size=2))
    with pytest.raises(ConfigError, match="one process, and this run has 2"):
        Trainer._recorded_passes(two, nn.Linear(1, 1))


# ---- families ----


def network() -> PixArt:
    torch.manual_seed(0)
    made = PixArt(hidden_size=32, num_heads=2, depth=3, caption_channels=16, input_size=8, model_max_length=6)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made.to(DEVICE)


def frozen() -> PixArt:
    return network().requires_grad_(False).eval()


def batch(number: int, length: int) -> TrainBatch:
    """Two samples, other ones for each number."""
    random = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    made = TrainBatch(
        latents_mean=normal(2, 4, 8, 8),
        latents_std=normal(2, 4, 8, 8).abs(),
        caption_embeds=normal(2, length, 16),
        caption_mask=torch.arange(length).expand(2, -1) < torch.tensor([[1], [length]]),
        img_hw=torch.full((2, 2), 64.0),
        aspect_ratio=torch.ones(2),
        sample_numbers=torch.tensor([2 * number, 2 * number + 1]),
        keys=[f"{number}-{index}" for index in range(2)],
        first_number=2 * number,
        control_mean=normal(2, 4, 8, 8),
        control_std=normal(2, 4, 8, 8).abs(),
    )
    return made.to(DEVICE)


def denoising(**options: Any) -> tuple[nn.Module, Any]:
    return network(), DenoisingObjective(IDDPM(), 0.2, **options)


def control() -> tuple[nn.Module, Any]:
    return ControlPixArt(frozen(), 2).to(DEVICE), ControlObjective(IDDPM(), 0.2)


def consistency() -> tuple[nn.Module, Any]:
    return network(), ConsistencyObjective(IDDPM(), 0.2, guidance=(3.0, 6.0), roles=Roles(frozen(), frozen()))


def consistency_of_an_adapter() -> tuple[nn.Module, Any]:
    student = network().requires_grad_(False)
    start_lora(student, 2, alpha=2)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return student.to(DEVICE), ConsistencyObjective(IDDPM(), 0.2, roles=Roles(None, None, adapters_off))


def one_step() -> tuple[nn.Module, Any]:
    return OneStepNetworks(network(), network()), DistributionMatching(IDDPM(), 0.2, teacher=frozen())


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "denoising": denoising,
    "routed until sample 6": lambda: denoising(routing=Routing(0.5, 1, 1, until_number=6)),
    "control": control,
    "consistency": consistency,
    "consistency of an adapter": consistency_of_an_adapter,
    "one step": one_step,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family_are_those_of_launched_passes(family: str) -> None:
    """Other numbers, captions and, where a lever ends, other work: nothing of the recorded batch may remain."""
    model, objective = FAMILIES[family]()
    model.train()

    def compute(given: TrainBatch) -> Tensor:
        loss = objective.loss(model, given, 0).loss
        loss.backward()
        return loss.detach().clone()

    passes = RecordedPasses(compute, model.parameters(), 6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number in range(7):
        given = batch(number, 3 + number % 4)
        found = passes.run(given, objective.choices(given), is_first=True)
        gradients = [None if p.grad is None else p.grad.clone() for p in trained]
        expected = RecordedPasses(compute, model.parameters(), 6).run(given, None, is_first=True)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for parameter, gradient in zip(trained, gradients):
            assert (parameter.grad is None) == (gradient is None)
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    assert passes.num_recorded == (2 if "routed" in family else 1)


def test_what_the_host_computes_is_not_recorded() -> None:
    networks, objective = one_step()
    paired = replace(objective, regression_weight=0.5)
    assert paired.choices(batch(0, 3)) is None and objective.choices(batch(0, 3)) is not None

    def compute(given: TrainBatch) -> Tensor:
        loss = paired.loss(networks, given, 0).loss
        loss.backward()
        return loss.detach()

    passes = RecordedPasses(compute, networks.parameters(), 6)
    found = [passes.run(batch(0, 3), paired.choices(batch(0, 3)), is_first=True).item() for _ in range(3)]
    assert len(set(found)) == 1 and passes.num_recorded == 0


def test_work_that_cannot_be_recorded_is_launched_and_said(caplog: pytest.LogCaptureFixture) -> None:
    if DEVICE.type != "cuda":
        pytest.skip("needs a GPU")
    layer = nn.Linear(16, 1).to(DEVICE)

    def compute(given: TrainBatch) -> Tensor:
        loss = layer(given.caption_embeds).square().mean()
        loss.backward()
        assert loss.item() >= 0  # waits for the device
        return loss.detach()

    passes = RecordedPasses(compute, layer.parameters(), 6)
    for number in range(3):
        passes.run(batch(number, 3), True, is_first=True)
        assert torch.isfinite(copy.copy(layer.weight.grad)).all()
    assert passes.num_recorded == 0 and "no CUDA graph" in caplog.text
