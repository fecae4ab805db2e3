"""The model of many GPUs reckons right where the answer is known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools.scaling_model import GPUS, STAGES, Assumptions, Host, all_reduce_s, reckoned, share_lost, step_s

ROOT = Path(__file__).parents[1]
HOST = Host(
    gpus=8,
    fixed_s={256: 0.01, 512: 0.01, 1024: 0.01},
    image_s={256: 0.003, 512: 0.012, 1024: 0.07},
    fitting={256: 64, 512: 24, 1024: 6},
    bus_gb_s=300.0,
    drag=0.1,
    spread_s=0.004,
    wait_s=0.3,
    write_s=10.0,
    first_step_s=20.0,
)


def figures() -> dict[str, Any]:
    """What scaling.py would have written on a host that is exactly `HOST`."""
    rows = []
    for px, batch in HOST.fitting.items():
        common = {"px": px, "strategy": "ddp"}
        for samples in (batch, batch // 4):
            seconds = HOST.fixed_s[px] + samples * HOST.image_s[px]
            spread = HOST.spread_s / seconds
            rows.append({**common, "processes": 1, "batch": samples, "ms_a_step": 1000 * seconds, "spread": spread})
        whole = HOST.fixed_s[px] + batch * HOST.image_s[px]
        slower = whole + HOST.drag * 2 * 7 / 8 * 2.443424384 / HOST.bus_gb_s
        rows.append({**common, "processes": 8, "batch": batch, "ms_a_step": 1000 * slower})
    saving = {"processes": 8, "strategy": "ddp", "wait_s": 0.3, "on_disk_after_s": 10.0, "first_step_after_s": 20.0}
    link = {"processes": 8, "bus_gb_s": HOST.bus_gb_s}
    return {"training": rows, "saving": [saving], "all_reduce": [link], "device": "8 x none", "commands": {}}


def test_a_host_is_found_in_its_measurements() -> None:
    found = Host.of(figures())
    for px in HOST.fitting:
        assert found.fixed_s[px] == pytest.approx(HOST.fixed_s[px])
        assert found.image_s[px] == pytest.approx(HOST.image_s[px])
    assert found.drag == pytest.approx(HOST.drag, rel=1e-6)
    assert found.spread_s == pytest.approx(HOST.spread_s)
    known = {"fixed_s": HOST.fixed_s, "image_s": HOST.image_s, "drag": HOST.drag, "spread_s": HOST.spread_s}
    assert replace(found, **known) == HOST


def test_slower_gpus_are_no_drag() -> None:
    slow = figures()
    for row in slow["training"]:
        if row["processes"] == 8:
            row["ms_a_step"] *= 1.05
    apart = [
        {"px": px, "strategy": "apart", "processes": 8, "batch": batch,
         "ms_a_step": 1.05 * 1000 * (HOST.fixed_s[px] + batch * HOST.image_s[px])}
        for px, batch in HOST.fitting.items()
    ]  # fmt: skip
    slow["training"] += apart
    assert Host.of(slow).drag == pytest.approx(1.05 * HOST.drag, rel=1e-6)


def test_a_step_is_its_arithmetic_where_nothing_is_in_the_way() -> None:
    ideal = replace(HOST, drag=0.0, spread_s=0.0)
    fast = Assumptions(network_gb_s=1e6, hop_latency_us=0.0)
    assert step_s(ideal, fast, 1024, 256, 64) == pytest.approx(0.01 + 64 * 0.003)
    assert step_s(ideal, fast, 1024, 256, 128) == pytest.approx(2 * (0.01 + 64 * 0.003))  # accumulated
    jittery = replace(ideal, spread_s=0.002)
    later = [step_s(jittery, fast, gpus, 256, 64) - step_s(ideal, fast, gpus, 256, 64) for gpus in (8, 64, 1024)]
    assert later[0] == 0 and 0.001 < later[1] < later[2] < 0.006
    slow = Assumptions(network_gb_s=0.1, hop_latency_us=0.0)
    expected = 0.01 + 0.003 + all_reduce_s(ideal, slow, 64) - 2 / 3 * (0.01 + 0.003)  # waits for all that is not hidden
    assert step_s(ideal, slow, 64, 256, 1) == pytest.approx(expected)
    assert all_reduce_s(ideal, slow, 64) > 2 * 7 / 8 * 2.443 / 8 / 0.1  # a GPU carries its eighth between hosts


def test_failures_cost_more_on_more_gpus_and_saves_are_as_far_apart_as_costs_least() -> None:
    assumed = Assumptions()
    lost = [share_lost(HOST, assumed, gpus)[0] for gpus in GPUS]
    assert lost == sorted(lost) and 0 < lost[0] < lost[-1] < 0.05
    best, interval = share_lost(HOST, assumed, 256)
    between = assumed.gpu_hours_between_failures * 3600 / 256
    for other in (0.7 * interval, 1.4 * interval):
        restart = assumed.detect_s + assumed.start_s + HOST.first_step_s
        assert HOST.wait_s / other + (other / 2 + restart) / between > best


def test_every_stage_and_number_of_gpus_has_a_row() -> None:
    rows = reckoned(HOST, Assumptions())
    assert len(rows) == len(STAGES) * len(GPUS)
    for row in rows:
        assert row["batch a GPU"] * row["GPUs"] == row["global batch"]
    assert [row["global batch"] for row in rows if row["stage"].startswith("5")] == [384, 384, 512, 512, 1024]


def test_the_page(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(figures()))
    command = [sys.executable, "tools/scaling_model.py", "--measured", str(path), "--network_gb_s", "25"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| GB/s between hosts that each GPU gets; a port of 400 Gb/s a GPU carries about 40 | 25.0 |" in done.stdout
    assert "## Reckoned, not run" in done.stdout and "| 4 aesthetics | 512 | 1024 |" in done.stdout
