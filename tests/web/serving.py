"""The page with a tiny model, served by a thread of this process."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from diffusion.config.app_cli import controlnet_app_parser
from diffusion.web.engine import Engine
from diffusion.web.examples import examples_of
from diffusion.web.models import VARIANTS, Chosen, make_artist
from diffusion.web.page import build_page
from diffusion.web.run_page import make_server
from diffusion.web.server import build_app, listen
from diffusion.web.settings import Limits, WebSettings

SMALL_VALUES: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "randomise": False}


@dataclass
class Served:
    """A page that answers at `url`."""

    url: str
    engine: Engine
    output: Path

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30, **options)

    @cached_property
    def _draw(self) -> tuple[int, list[tuple[str, Any]]]:
        """Number of the function, and its arguments with their defaults."""
        config = self.get("/config").json()
        number = next(item["id"] for item in config["dependencies"] if item["api_name"] == "draw")
        known = self.get("/gradio_api/info").json()["named_endpoints"]["/draw"]["parameters"]
        return number, [(item["parameter_name"], item.get("parameter_default")) for item in known]

    def ask(self, changed: dict[str, Any], session: str) -> httpx.Response:
        """Ask for a picture with raw JSON, as no browser would: `changed` goes to the server as it is."""
        number, arguments = self._draw
        given = {"prompt": "fox", **SMALL_VALUES, **changed}
        data = [given.get(name, usual) for name, usual in arguments]
        body = json.dumps({"data": [*data, None], "fn_index": number, "session_hash": session})
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.url}/gradio_api/queue/join", content=body, headers=headers, timeout=60)

    def stop(self, session: str) -> None:
        """As the button of the page: past the queue."""
        body = {"data": [], "session_hash": session}
        assert httpx.post(f"{self.url}/gradio_api/run/stop", json=body, timeout=60).status_code == 200

    def join(self, changed: dict[str, Any], session: str = "stranger") -> dict[str, Any]:
        """As `ask`, and the last message about it."""
        answer = self.ask(changed, session)
        if answer.status_code != 200:
            return {"success": False, "status": answer.status_code, "text": answer.text}
        return self.result(answer.json()["event_id"], session)

    def result(self, event: str, session: str) -> dict[str, Any]:
        """The last message about a request."""
        with httpx.stream("GET", f"{self.url}/gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("event_id") == event and message["msg"] == "process_completed":
                    return dict(message)
        raise AssertionError("the queue gave no answer")


def make_engine(model: Path, output: Path, controlnet: Path | None = None, **settings: Any) -> Engine:
    """An engine around a model; settings: of `WebSettings`."""
    args = controlnet_app_parser(None).parse_args(["--device", "cpu", "--lora_dir", str(output / "loras")])
    args.pipeline_load_from = str(model)
    options = {} if controlnet is None else {"controlnet": str(controlnet)}
    web = WebSettings(host="127.0.0.1", port=0, output=output, **{"limits": Limits(max_side_px=512), **settings})
    return Engine(lambda: make_artist(args, Chosen(str(model), options), web), web)


@contextlib.contextmanager
def served(engine: Engine, notice: str = "") -> Iterator[Served]:
    """Serve an engine on a free port until the block ends."""
    examples = examples_of(engine.artist, engine.settings.output, draw=False)
    app = build_app(build_page(engine, VARIANTS["1024"], notice, examples), engine)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    engine.start()
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        assert httpx.get(f"{url}/healthz", timeout=30).status_code == 200  # waits in the backlog until it answers
        yield Served(url, engine, engine.settings.output)
    finally:
        server.should_exit = True
        engine.close()
        thread.join(timeout=20)
        listener.close()


@contextlib.contextmanager
def run_served(folder: Path) -> Iterator[str]:
    """The address of the page of a run's folder, until the block ends."""
    server = make_server(folder, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def row(step: int, **values: float) -> str:
    """A line of metrics.jsonl."""
    known = {"loss": 1 / step, "grad_norm": 0.1, "lr": 1e-4, "images_per_s": 50.0, "remaining_s": 60.0}
    return json.dumps({"step": step, "time": 1.0, **known, **values}) + "\n"
