"""The web server around a page: /healthz, /metrics, limits on what comes in, and how it starts."""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import Receive, Scope, Send

from diffusion.errors import ConfigError
from diffusion.web.engine import Engine
from diffusion.web.settings import WebSettings

_logger = logging.getLogger("pixart.web")
_STYLE = Path(__file__).with_name("style.css")
_MIN_FREE_BYTES = 1_000_000_000
_MAX_SESSIONS = 200  # tabs and API clients that are remembered; the oldest lose their gallery
_MAX_UPLOADS = 4  # of the largest size, in one request
_SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
_SYSTEM_MONO = ("ui-monospace", "Consolas", "monospace")


def build_app(page: gr.Blocks, engine: Engine) -> FastAPI:
    """The whole application: the page at /, /healthz and /metrics beside it."""
    settings = engine.settings
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> JSONResponse:
        status = "ok" if engine.healthy else "failed"
        state = {"status": status, "waiting": engine.num_waiting, "drawing": engine.is_drawing}
        return JSONResponse(state, status_code=200 if engine.healthy else 503)

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        if not settings.public_metrics and not _is_this_machine(request):
            return PlainTextResponse("set DEMO_METRICS=1 to read metrics from another machine\n", status_code=403)
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    settings.output.mkdir(parents=True, exist_ok=True)
    gr.set_static_paths([settings.output, Path(__file__).with_name("examples")])  # served without a copy in a cache
    # gradio checks the paths that clients send only once a page is "launched", which mounting does not say.
    page.has_launched = True
    page.run_history = False
    page.state_session_capacity = _MAX_SESSIONS
    mounted = gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=list(settings.auth) or None,
        allowed_paths=[],
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size=settings.limits.max_upload_bytes,
        footer_links=["api"],
        theme=_theme(),
        css=_STYLE.read_text(encoding="utf-8"),
    )
    mounted.add_middleware(Gate)
    mounted.add_middleware(RequestBodyLimitMiddleware, max_body_size=_MAX_UPLOADS * settings.limits.max_upload_bytes)
    return mounted


class Gate:
    """Before gradio reads anything: notes when a request came, refuses uploads to a full disk and fetched addresses."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["arrival"] = time.monotonic()
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Any:
        path = scope["path"].lower()
        if "/file=http:" in path or "/file=https:" in path or "/proxy=" in path:
            return PlainTextResponse("addresses are not fetched here\n", status_code=403)
        uploads = scope["method"] == "POST" and path.endswith("/upload")
        if uploads and shutil.disk_usage(tempfile.gettempdir()).free < _MIN_FREE_BYTES:
            return PlainTextResponse("the disk is full; try again later\n", status_code=507)
        return None


def serve(app: FastAPI, settings: WebSettings, say: Callable[[str], None] = print) -> None:
    """Serve until interrupted. Says where the page is once it answers.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    listener = listen(settings.host, settings.port)
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        forwarded_allow_ips="*" if settings.behind_proxy else None,
    )
    _Server(config, lambda: say(start_line(settings, port))).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, whose clients wait to be accepted; port 0 = any that is free. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened at ({error.strerror}); choose another with DEMO_PORT and DEMO_HOST"
        ) from error
    return listener


def start_line(settings: WebSettings, port: int) -> str:
    """Where the page is, who reaches it, and where its pictures are."""
    shown = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"
    shown = f"[{shown}]" if ":" in shown else shown
    if settings.is_local:
        reach = "for this machine alone; DEMO_HOST=0.0.0.0 opens it"
    else:
        login = "with a login" if settings.auth else "without a login (DEMO_AUTH=user:password asks for one)"
        reach = f"open to everybody who reaches {settings.host}, {login}"
    kept = f"pictures (the newest {settings.keep_pictures}) are in {_short(settings.output)}"
    return f"http://{shown}:{port}  {reach}\n{kept}"


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _is_this_machine(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _theme() -> Any:
    """System fonts alone: nothing of the page comes from another server. Cards on a tint, inputs with visible edges."""
    return gr.themes.Soft(
        primary_hue=gr.themes.colors.violet,
        secondary_hue=gr.themes.colors.fuchsia,
        neutral_hue=gr.themes.colors.slate,
        font=_SYSTEM_FONTS,
        font_mono=_SYSTEM_MONO,
        radius_size=gr.themes.sizes.radius_lg,
    ).set(
        body_background_fill="*neutral_100",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_700",
        block_title_background_fill="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_weight="600",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_border_width_dark="0px",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        border_color_accent="*primary_500",
        border_color_primary="*neutral_300",
        border_color_primary_dark="*neutral_600",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        input_shadow="none",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        checkbox_label_border_width="1px",
        checkbox_label_border_width_dark="1px",
        checkbox_label_border_color="*neutral_300",
        checkbox_label_border_color_dark="*neutral_600",
        checkbox_label_background_fill_selected="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_cancel_border_color="*neutral_300",
        button_cancel_border_color_dark="*neutral_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )
