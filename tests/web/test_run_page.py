"""A run's folder in the browser, while it is written."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from diffusion.errors import DataError
from diffusion.web.run_page import RunFolder
from tests.web.serving import row


def test_curves_and_grids(run: Path) -> None:
    state = RunFolder(run).state()
    loss = state["curves"]["loss"]
    assert 400 <= len(loss) <= 800 and loss[-1] == [2000, 1 / 2000]
    assert state["total_steps"] == 4000 and state["newest"]["remaining_s"] == 60.0
    assert [picture["step"] for picture in state["pictures"]] == [0, 200, 1000]
    assert "validation_loss" not in state["curves"]


def test_it_is_read_while_it_is_written(run: Path) -> None:
    shown = RunFolder(run)
    shown.state()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row(2001) + row(2002)[:20])
    assert shown.state()["newest"]["step"] == 2001
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row(2002)[20:])
    assert shown.state()["newest"]["step"] == 2002
    (run / "metrics.jsonl").write_text(row(1) + row(2, validation_loss=0.5))  # resumed from an early checkpoint
    state = shown.state()
    assert state["newest"]["step"] == 2 and state["curves"]["validation_loss"] == [[2, 0.5]]


def test_damaged_lines_are_passed_over(run: Path) -> None:
    (run / "metrics.jsonl").write_text('nonsense\n[1]\n{"step": "x"}\n' + row(3))
    assert RunFolder(run).state()["curves"]["loss"] == [[3, 1 / 3]]


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--work-dir"):
        RunFolder(tmp_path)


def test_what_is_served_and_what_is_not(run: Path, address: str) -> None:
    assert "<h1" in httpx.get(address).text
    assert httpx.get(f"{address}/run.json").json()["name"] == "emoji"
    picture = (run / "validation/step_0000200.png").read_bytes()
    assert httpx.get(f"{address}/validation/step_0000200.png").content == picture
    for path in ("validation/../config.json", "validation/%2e%2e%2fconfig.json", "config.json", "validation/step_9.png",
                 "validation//etc/passwd", "..%2f..%2fetc%2fpasswd"):  # fmt: skip
        assert httpx.get(f"{address}/{path}").status_code == 404, path


def test_values_that_are_not_finite_do_not_break_the_page(run: Path, address: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row(2001, grad_norm=float("inf"), loss=float("nan")))
    state = httpx.get(f"{address}/run.json")
    assert state.status_code == 200 and state.json()["curves"]["loss"][-1][0] == 2000
