"""A training run in the browser, live: what its folder says, read while it is written. Imports no torch."""

from __future__ import annotations

import argparse
import json
import math
import re
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from diffusion.errors import ConfigError, DataError

_PAGE = Path(__file__).with_name("run_page.html")
_PICTURE = re.compile(r"step_(\d+)\.png")
_MAX_POINTS = 800  # of a curve; a page is not wider
_CURVES = ("loss", "validation_loss", "lr", "grad_norm", "images_per_s", "data_wait_share", "peak_memory_gib")


class RunFolder:
    """metrics.jsonl, config.json and validation/ of a work-dir.

    Raises:
        DataError: no metrics.jsonl is there.
    """

    def __init__(self, work_dir: str | Path) -> None:
        self.path = Path(work_dir)
        self._metrics = self.path / "metrics.jsonl"
        if not self._metrics.is_file():
            raise DataError(f"{self._metrics} does not exist; give the --work-dir of a run that has begun")
        self._rows: list[dict[str, Any]] = []
        self._read_to = 0

    def state(self) -> dict[str, Any]:
        """Curves as lists of [step, value], the newest values, the names of the validation grids, age in seconds."""
        self._read_on()
        config = _json(self.path / "config.json")
        newest: dict[str, Any] = {}
        for row in self._rows[-50:]:
            newest |= {name: value for name, value in row.items() if not _is_broken(value)}
        return {
            "name": self.path.resolve().name,
            "curves": {name: curve for name in _CURVES if (curve := self._curve(name))},
            "newest": newest,
            "total_steps": config.get("max_steps"),
            "model": config.get("model"),
            "batch": config.get("train_batch_size"),
            "pictures": self.pictures(),
            "age_s": max(0.0, time.time() - newest.get("time", 0.0)) if newest else None,
        }

    def pictures(self) -> list[dict[str, Any]]:
        """Validation grids, the oldest first."""
        found = [(int(match[1]), path.name) for path in self.path.glob("validation/*.png")
                 if (match := _PICTURE.fullmatch(path.name))]  # fmt: skip
        return [{"step": step, "name": name} for step, name in sorted(found)]

    def picture(self, name: str) -> bytes | None:
        """A validation grid by its name; None for any other name, and for one that is not there."""
        path = self.path / "validation" / name
        return path.read_bytes() if _PICTURE.fullmatch(name) and path.is_file() else None

    def _curve(self, name: str) -> list[list[float]]:
        points = [[row["step"], row[name]] for row in self._rows if _is_number(row.get(name))]
        stride = -(-len(points) // _MAX_POINTS) or 1
        return points[::-1][::stride][::-1]  # the last one always

    def _read_on(self) -> None:
        """Read what was added; all anew when the file became shorter, as it does when a run is resumed."""
        size = self._metrics.stat().st_size
        if size < self._read_to:
            self._rows, self._read_to = [], 0
        with self._metrics.open("rb") as file:
            file.seek(self._read_to)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]  # the last line may be half written
        self._read_to += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                self._rows.append(row)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_broken(value: Any) -> bool:
    """Infinite or not a number, which JSON in a browser does not know (fp16 steps that were skipped log them)."""
    return isinstance(value, float) and not math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a folder of another program may have none
    return value if isinstance(value, dict) else {}


class _Handler(BaseHTTPRequestHandler):
    run: ClassVar[RunFolder]

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if path == "/":
            self._answer("text/html; charset=utf-8", _PAGE.read_bytes())
        elif path == "/run.json":
            self._answer("application/json", json.dumps(self.run.state(), allow_nan=False, default=str).encode())
        elif path.startswith("/validation/") and (picture := self.run.picture(path.removeprefix("/validation/"))):
            self._answer("image/png", picture)
        else:
            self.send_error(404)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: the page asks every two seconds."""


def make_server(work_dir: str | Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is bound and not yet running; port 0 = any that is free.

    Raises:
        DataError: see `RunFolder`. ConfigError: the address cannot be listened at.
    """
    handler = type("Handler", (_Handler,), {"run": RunFolder(work_dir)})
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_class = type("Server", (ThreadingHTTPServer,), {"daemon_threads": True, "address_family": family})
        made: ThreadingHTTPServer = server_class((host, port), handler)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be listened at ({error.strerror}); choose another --port") from error
    return made


def show_run(args: argparse.Namespace) -> None:
    """Serve the page of a run until it is interrupted."""
    server = make_server(args.work_dir, args.host, args.port)
    print(f"http://{args.host}:{server.server_address[1]}  {args.work_dir}, read every two seconds", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
