from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from diffusers import SASolverScheduler as StockSASolverScheduler

from diffusion.inference import make_scheduler
from diffusion.sa_solver_diffusers import SASolverScheduler


def test_the_readmes_call_works_and_stays_serialisable(tmp_path: Path) -> None:
    scheduler = SASolverScheduler.from_config(
        make_scheduler("dpm-solver").config,
        algorithm_type="data_prediction",
        tau_func=lambda t: 1 if 200 <= t <= 800 else 0,
        predictor_order=2,
        corrector_order=2,
    )
    assert (scheduler.tau_func(500), scheduler.tau_func(100)) == (1, 0)
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["tau_func"] is None
    assert (config["predictor_order"], config["beta_schedule"]) == (2, "linear")
    for cls in (SASolverScheduler, StockSASolverScheduler):
        loaded = cls.from_pretrained(tmp_path)
        assert [loaded.tau_func(t) for t in (199, 200, 800, 801)] == [0, 1, 1, 0]


def test_a_tau_of_ones_own_is_used_and_its_loss_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = SASolverScheduler(tau_func=lambda t: 0.5)
    assert scheduler.tau_func(10) == 0.5
    with caplog.at_level(logging.WARNING):
        scheduler.save_pretrained(tmp_path)
    assert "tau_func cannot be saved" in caplog.text
