"""What a page is told from outside: environment variables, arguments, and the limits that follow from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion.errors import ConfigError

MAX_PROMPT_CHARS = 2000  # as many as T5 is given at most
MAX_SEED = 2**31 - 1
LOCAL_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait. Checked on the server, whatever the page's sliders allow."""

    max_side_px: int = 2048
    max_steps: int = 100
    max_pictures: int = 8
    max_guidance: float = 30.0
    max_prompt_chars: int = MAX_PROMPT_CHARS
    max_upload_bytes: int = 20_000_000
    max_waiting: int = 20
    max_waiting_per_user: int = 4


@dataclass(frozen=True)
class WebSettings:
    """How a page is served.

    auth: pairs of user and password; empty = open. output: folder of the pictures, of which the newest
    `keep_pictures` stay. behind_proxy: a Space, whose proxy names the clients. fetch: official files that are not on
    this machine come from the hub.
    """

    host: str
    port: int
    output: Path
    limits: Limits
    auth: tuple[tuple[str, str], ...] = ()
    keep_pictures: int = 1000
    log_prompts: bool = False
    public_metrics: bool = False
    cache_examples: bool = False
    compile: bool = False
    cpu_offload: bool = False
    consistency_decoder: bool = False
    duplicate_button: bool = False
    behind_proxy: bool = False
    fetch: bool = False

    @property
    def is_local(self) -> bool:
        """Whether this machine alone reaches the page."""
        return self.host in (LOCAL_HOST, "localhost", "::1")


def read_settings(
    args: argparse.Namespace, environ: Mapping[str, str], *, default_port: int = 15432, on_card: bool = False
) -> WebSettings:
    """Arguments before environment variables before defaults.

    Raises:
        ConfigError: a variable that is no number, out of range, or DEMO_AUTH without a colon.
    """
    space = "SPACE_ID" in environ  # set on a hosted Space, where the proxy expects port 7860
    usual_port = 7860 if space else default_port
    port = _whole(environ, "DEMO_PORT", usual_port, 0, 65535) if args.port is None else args.port
    limits = Limits(
        max_side_px=_whole(environ, "MAX_IMAGE_SIZE", 2048 if on_card else 1024, 64, 8192),
        max_upload_bytes=_whole(environ, "DEMO_MAX_UPLOAD_MB", 20, 1, 100) * 1_000_000,
        max_waiting=_whole(environ, "DEMO_QUEUE_SIZE", 20, 1, 32),
        max_waiting_per_user=_whole(environ, "DEMO_QUEUE_PER_USER", 4, 1, 32),
    )
    return WebSettings(
        host=args.host or environ.get("DEMO_HOST") or ("0.0.0.0" if space else LOCAL_HOST),
        port=port,
        output=Path(environ.get("DEMO_OUTPUT") or "output/online_demo_img").resolve(),
        limits=limits,
        auth=_auth(environ.get("DEMO_AUTH", "")),
        keep_pictures=_whole(environ, "DEMO_KEEP_PICTURES", 1000, 1, 10**9),
        log_prompts=_switch(environ, "DEMO_LOG_PROMPTS"),
        public_metrics=_switch(environ, "DEMO_METRICS"),
        cache_examples=_switch(environ, "CACHE_EXAMPLES"),
        compile=_switch(environ, "USE_TORCH_COMPILE"),
        cpu_offload=_switch(environ, "ENABLE_CPU_OFFLOAD"),
        consistency_decoder=bool(environ.get("CONSISTENCY_DECODER")),
        duplicate_button=_switch(environ, "SHOW_DUPLICATE_BUTTON"),
        behind_proxy=space,
        fetch=on_card if environ.get("DEMO_FETCH") == "auto" else _switch(environ, "DEMO_FETCH", " or auto"),
    )


def _whole(environ: Mapping[str, str], name: str, usual: int, low: int, high: int) -> int:
    text = environ.get(name)
    if not text:
        return usual
    value = int(text) if text.strip().isdecimal() else math.inf
    if not low <= value <= high:
        raise ConfigError(f"{name}={text!r} must be a whole number in {low}..{high}")
    return int(value)


def _switch(environ: Mapping[str, str], name: str, further: str = "") -> bool:
    text = environ.get(name, "0")
    if text not in ("", "0", "1"):
        raise ConfigError(f"{name}={text!r} must be 1 or 0{further}")
    return text == "1"


def _auth(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [part.partition(":") for part in text.split(",") if part]
    if any(not user or not password for user, _, password in pairs):
        raise ConfigError("DEMO_AUTH must be user:password, or several of them with commas between")
    return tuple((user, password) for user, _, password in pairs)
