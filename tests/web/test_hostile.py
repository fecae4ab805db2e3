"""200 hostile requests against the running page: none crashes it, none is shown a traceback, the next one is served."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.web.serving import SMALL_VALUES, Served

pytestmark = [pytest.mark.slow, pytest.mark.alone]
ROOT = Path(__file__).parents[2]
ODD: list[Any] = [
    None, float("nan"), float("inf"), -1, 0, 1, 2**31, 10**30, 0.5, "", "16", "x" * 10_000, "\x00\x1b[2J", "../../etc",
    True, [], {}, [[[]]], {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"__type__": "update"},
]  # fmt: skip
NAMES = (
    "prompt", "negative_prompt", "style", "mode", "width", "height", "solver", "steps", "guidance_scale", "seed",
    "randomise", "pictures", "image", "strength", "painted", "control_image", "control_strength", "lora", "lora_scale",
)  # fmt: skip


def odd_values(rng: random.Random) -> dict[str, Any]:
    return {name: rng.choice(ODD) for name in rng.sample(NAMES, rng.randint(1, 4))}


def large_texts(rng: random.Random) -> dict[str, Any]:
    text = rng.choice(["a", "\u202e", "\U0001f34e", "--ar 1:1 ", "<script>alert(1)</script>", "\x00"])
    return {rng.choice(["prompt", "negative_prompt"]): text * (10**6 // len(text))}


def wrong_paths(rng: random.Random) -> dict[str, Any]:
    place = rng.choice(
        ["/etc/passwd", "../../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x", str(ROOT / "README.md")]
    )
    file = {"path": place, "url": place, "meta": {"_type": "gradio.FileData"}}
    painted = {"background": file, "layers": [file], "composite": None}
    return {"mode": "inpaint", "painted": painted} if rng.random() < 0.3 else {"mode": "image", "image": file}


def broken_picture(rng: random.Random, site: Served) -> dict[str, Any]:
    """An upload of a real picture with some bytes changed, cut or added."""
    data = bytearray(next((ROOT / "data/emoji/images").glob("*.webp")).read_bytes())
    for _ in range(rng.randint(1, 60)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data
    name = rng.choice(["a.png", "a.webp", "a.svg", "a.html", "..%2f..%2fa.png", "a" * 300 + ".png"])
    uploaded = httpx.post(f"{site.url}/gradio_api/upload", files={"files": (name, bytes(data))}, timeout=30)
    if uploaded.status_code != 200:
        assert "Traceback" not in uploaded.text
        return {"mode": "image"}
    return {"mode": "image", "image": {"path": uploaded.json()[0], "meta": {"_type": "gradio.FileData"}}}


def test_two_hundred_hostile_requests(site: Served) -> None:
    rng = random.Random(0)
    kinds = {"odd": 90, "large": 15, "path": 25, "picture": 30}
    outcomes: dict[str, int] = {}
    for kind, count in kinds.items():
        for number in range(count):
            makers = {"odd": odd_values, "large": large_texts, "path": wrong_paths}
            changed = broken_picture(rng, site) if kind == "picture" else makers[kind](rng)
            answer = site.join(changed, f"{kind}{number}")
            text = json.dumps(answer)
            assert "Traceback" not in text and 'File "' not in text and "root:x" not in text, text[:500]
            outcome = f"{kind} {'served' if answer['success'] else 'refused'}"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if kind in ("large", "path"):
                assert not answer["success"], changed
    assert outcomes["odd refused"] >= 60, outcomes
    assert outcomes["picture refused"] >= 10, outcomes  # WebP forgives some changed bytes
    cancel_in_parallel(site, 40)
    assert site.get("/healthz").json()["status"] == "ok"
    answer = site.join({}, "polite")
    assert answer["success"] is True, answer


def cancel_in_parallel(site: Served, count: int) -> None:
    """Requests that are stopped, cancelled or left while they wait or are drawn."""
    number = site._draw[0]

    def one(index: int) -> None:
        session = f"parallel{index}"
        answer = site.ask({"steps": 50, "pictures": 4}, session)
        assert answer.status_code == 200
        event = answer.json()["event_id"]
        if index % 3 == 0:
            cancel = {"session_hash": session, "fn_index": number, "event_id": event}
            httpx.post(f"{site.url}/gradio_api/cancel", json=cancel, timeout=30)
        elif index % 3 == 1:
            site.engine.cancel(session)
        else:  # a client that reads the first words and hangs up
            with httpx.stream("GET", f"{site.url}/gradio_api/queue/data?session_hash={session}", timeout=30) as lines:
                next(lines.iter_lines())

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert not any(thread.is_alive() for thread in threads)
    stop_the_rest(site, [f"parallel{index}" for index in range(count)])


def stop_the_rest(site: Served, sessions: list[str]) -> None:
    """A request may reach the engine after it was cancelled: cancel until for two seconds none has come."""
    deadline = time.monotonic() + 60
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 2:
        assert time.monotonic() < deadline, "requests that were cancelled are still there"
        stopped = sum(site.engine.cancel(session) for session in sessions)
        if stopped or site.engine.is_drawing or site.engine.num_waiting:
            quiet_since = time.monotonic()
        time.sleep(0.05)


def test_fifty_clients_at_once_get_their_own_pictures(site: Served) -> None:
    """A full queue is a polite message; whoever is served gets the seed that was asked for."""
    answers: list[dict[str, Any]] = []

    def one(number: int) -> None:
        answers.append(site.join({"seed": number, "prompt": f"fox {number}", **SMALL_VALUES}, f"client{number}"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=150)
    assert len(answers) == 50
    served = [answer for answer in answers if answer["success"]]
    refused = [answer["output"]["error"] for answer in answers if not answer["success"]]
    assert len(served) >= 4
    assert all("requests are waiting" in text or "places in the queue" in text for text in refused), refused[:3]
    for answer in served:
        gallery, seed = answer["output"]["data"][:2]
        assert gallery[0]["caption"] == f"fox {seed} (seed {seed})"
