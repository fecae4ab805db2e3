"""Memory and start-up of the drawing page: seconds until it answers and until the first picture, then its memory over
many requests. Each request is a browser session of its own, of small pictures by the bundled model.

    python benchmarks/bench_app_memory.py --requests 1000
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from report import write_report

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64, help="px of the pictures (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/app_memory.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "DEMO_OUTPUT": folder, "DEMO_KEEP_PICTURES": "100"}
        command = [sys.executable, "app/app.py", "--port", "0", "--device", "cpu"]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = next(match[0] for line in process.stdout if (match := re.match(r"http://\S+", line)))
            answers_s = time.perf_counter() - started
            site = Site(url)
            site.draw("start", width=256, height=256, steps=14)
            first_picture_s = time.perf_counter() - started
            write_report(args.out, {
                "start": {"page_answers_s": round(answers_s, 1), "first_picture_s": round(first_picture_s, 1)},
                **memory(site, process.pid, args),
            })  # fmt: skip
        finally:
            process.terminate()
            process.wait(timeout=30)


def memory(site: Site, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """Resident memory in MB, as requests go on; seconds a request."""
    every = max(1, args.requests // 10)
    resident: dict[str, float] = {}
    started = time.perf_counter()
    for number in range(1, args.requests + 1):
        site.draw(f"session{number}", width=args.size, height=args.size, steps=args.steps)
        if number % every == 0:
            resident[str(number)] = round(resident_mb(pid), 1)
    seconds = (time.perf_counter() - started) / args.requests
    values = list(resident.values())
    return {
        "requests": args.requests,
        "pictures": f"{args.size} px, {args.steps} steps",
        "seconds_a_request": round(seconds, 3),
        "resident_mb": resident,
        "growth_in_the_second_half": f"{100 * (values[-1] / values[len(values) // 2 - 1] - 1):.1f} %",
    }


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1000


class Site:
    """The page, asked as its own browser code asks it."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        config = self._client.get("/config").json()
        self._number = next(item["id"] for item in config["dependencies"] if item["api_name"] == "draw")
        parameters = self._client.get("/gradio_api/info").json()["named_endpoints"]["/draw"]["parameters"]
        self._arguments = {item["parameter_name"]: item.get("parameter_default") for item in parameters}

    def draw(self, session: str, **values: Any) -> None:
        data = [*{**self._arguments, "prompt": "red apple", **values}.values(), None]
        body = {"data": data, "fn_index": self._number, "session_hash": session}
        self._client.post("/gradio_api/queue/join", json=body).raise_for_status()
        with self._client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return


if __name__ == "__main__":
    main()
