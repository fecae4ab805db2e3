"""The page over HTTP: its API, its health, and what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from diffusion.inference.recipe import read_recipe
from diffusion.web.settings import Limits
from diffusion.web.uploads import MaskEditor
from tests.web.serving import SMALL_VALUES, Served, make_engine, served

SMALL: dict[str, Any] = {**SMALL_VALUES, "api_name": "/draw"}


@pytest.fixture(scope="module")
def client(site: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    connected = Client(site.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
    yield connected
    connected.close()


def picture_file(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGB", size, "white").save(path)
    return path


def test_draw_by_its_api(client: Client) -> None:
    gallery, seed, *_ = client.predict("red apple", seed=7, pictures=2, **SMALL)
    assert seed == 7 and len(gallery) == 2
    recipe = read_recipe(gallery[0]["image"])  # the newest first
    assert recipe["seed"] == 8 and recipe["steps"] == 2
    assert gallery[1]["caption"] == "red apple (seed 7)"


def test_every_seed_is_new_unless_it_is_given(client: Client) -> None:
    first, second = (client.predict("fox", **{**SMALL, "randomise": True})[1] for _ in range(2))
    assert first != second


def test_draw_from_a_picture_by_its_api(client: Client, tmp_path: Path) -> None:
    upload = handle_file(str(picture_file(tmp_path / "a.png")))
    gallery, *_ = client.predict("red apple", mode="image", image=upload, strength=0.5, **SMALL)
    assert read_recipe(gallery[0]["image"])["strength"] == 0.5
    gallery, *_ = client.predict("red apple", mode="edges", control_image=upload, **SMALL)
    assert read_recipe(gallery[0]["image"])["control_image"]


def test_what_is_wrong_is_said(client: Client) -> None:
    for wrong, said in (
        ({"prompt": "x" * 10**6}, "1,000,000 characters"),
        ({"prompt": ""}, "prompt is empty"),
        ({"steps": 101}, "101"),
        ({"width": 16384}, "16384"),
        ({"style": "Baroque"}, "Baroque"),
        ({"mode": "image"}, "no picture to begin from"),
    ):
        with pytest.raises(AppError, match=said) as caught:
            client.predict(**{"prompt": "red apple", **SMALL, **wrong})
        assert "Traceback" not in str(caught.value) and "/" not in str(caught.value).replace("black/white", "")
    assert len(client.predict("red apple", **SMALL)[0]) >= 1


def test_health_and_metrics(site: Served, client: Client) -> None:
    client.predict("red apple", **SMALL)
    assert site.get("/healthz").json() == {"status": "ok", "waiting": 0, "drawing": False}
    text = site.get("/metrics").text
    assert 'pixart_requests_total{outcome="done"}' in text and "pixart_request_seconds_bucket" in text
    assert "red apple" not in text


def test_an_unhealthy_engine_answers_503(site: Served) -> None:
    site.engine.healthy = False
    try:
        assert site.get("/healthz").status_code == 503
    finally:
        site.engine.healthy = True


def test_large_bodies_are_refused_before_they_are_read(site: Served) -> None:
    limit = 4 * site.engine.settings.limits.max_upload_bytes
    answer = httpx.post(f"{site.url}/gradio_api/queue/join", content=b"x" * (limit + 1), timeout=60)
    assert answer.status_code == 413

    def stream() -> Iterator[bytes]:
        for _ in range(limit // 10**6 + 2):
            yield b"x" * 10**6

    try:
        answer = httpx.post(f"{site.url}/gradio_api/queue/join", content=stream(), timeout=60)
        assert answer.status_code in (413, 422, 500)
    except httpx.TransportError:  # closed while it was sending
        pass
    assert site.get("/healthz").status_code == 200


def test_files_elsewhere_are_not_read(site: Served, tmp_path: Path) -> None:
    """By address, by path, by a path that a client claims to have uploaded, and by a server on this machine."""
    canary = tmp_path / "canary.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(canary)
    secret = canary.read_bytes()
    places = [canary, "/etc/passwd", Path(__file__), "diffusion/errors.py", "../../etc/passwd", "%2e%2e/etc/passwd"]
    places += [f"{site.output}/../{canary}", f"{site.output}%2f..%2f..%2fetc%2fpasswd", f"file://{canary}"]
    places += [f"http://127.0.0.1:1/{canary}", f"{site.url}/healthz", "http://169.254.169.254/latest/meta-data"]
    for place in places:
        answer = site.get(f"/gradio_api/file={place}")
        assert answer.status_code in (403, 404), f"{place}: {answer.status_code}"
        assert secret not in answer.content and b"root:" not in answer.content
    for place in [str(canary), "/etc/passwd", f"{site.url}/healthz", "http://169.254.169.254/latest/meta-data"]:
        said = site.join({"mode": "image", "image": {"path": place, "meta": {"_type": "gradio.FileData"}}})
        assert said["success"] is False, place
        assert "Traceback" not in json.dumps(said)


def test_raw_json_draws_too(site: Served) -> None:
    """The helper above asks properly: what it is refused elsewhere is refused for its contents."""
    assert site.join({})["success"] is True


def test_a_stop_right_after_draw_is_not_lost(site: Served, tmp_path: Path) -> None:
    """While the picture to begin from is decoded, the request has not reached the engine yet."""
    large = picture_file(tmp_path / "large.png", (4000, 4000))
    with large.open("rb") as file:
        uploaded = httpx.post(f"{site.url}/gradio_api/upload", files={"files": file}, timeout=60).json()[0]
    image = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
    event = site.ask({"mode": "image", "image": image, "steps": 100, "pictures": 8}, "hasty").json()["event_id"]
    site.stop("hasty")
    said = site.result(event, "hasty")
    assert said["success"] and "Stopped." in json.dumps(said["output"])
    assert site.join({}, "hasty")["success"]  # what comes later is drawn


def test_a_hostile_picture_is_refused_by_the_one_decoder(client: Client, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<html>no picture</html>")
    with pytest.raises(AppError, match="cannot be used"):
        client.predict("red apple", mode="image", image=handle_file(str(bad)), **SMALL)


def test_an_upload_that_is_too_large_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    limits = Limits(max_side_px=128, max_upload_bytes=1000)
    with served(make_engine(tiny_model, tmp_path, limits=limits)) as small:
        answer = httpx.post(f"{small.url}/gradio_api/upload", files={"files": ("a.png", b"x" * 1001)}, timeout=30)
        assert answer.status_code == 413


def test_a_login_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    with served(make_engine(tiny_model, tmp_path, auth=(("me", "secret"),))) as closed:
        assert closed.get("/config").status_code == 401
        assert closed.get("/gradio_api/info").status_code == 401
        assert closed.get("/healthz").status_code == 200
        wrong = httpx.post(f"{closed.url}/login", data={"username": "me", "password": "guess"}, timeout=30)
        assert wrong.status_code == 400
        with_login = Client(closed.url, auth=("me", "secret"), verbose=False)
        assert len(with_login.predict("red apple", **SMALL)[0]) == 1
        with_login.close()


def test_the_page_fetches_nothing_from_elsewhere(site: Served) -> None:
    html = site.get("/").text
    fetched = [part.split('"')[0] for part in html.split('src="')[1:]]
    fetched += [part.split('"')[0] for tag in html.split("<link")[1:] for part in tag.split(">")[0].split('href="')[1:]]
    assert fetched and not [address for address in fetched if address.startswith("http")]
    assert "googleapis" not in site.get("/theme.css").text + html


def test_strokes_have_bounds(site: Served) -> None:
    """An index of a million layers, or strokes that nobody comes back for, do not fill the memory."""
    editor = next(block for block in site.get("/config").json()["components"] if block["type"] == "imageeditor")
    component = site_component(site, editor["id"])

    client = httpx.Client(base_url=site.url, timeout=30)

    def send(index: str, name: str) -> int:
        data = {"type": "layer", "index": index, "id": name, "fn_name": "accept_blobs", "session_hash": "stranger"}
        data["component_id"] = str(editor["id"])
        files = {"file": ("blob", io.BytesIO(b"x"), "image/png")}
        return client.post("/gradio_api/component_server", data=data, files=files).status_code

    assert send("0", "one") == 200
    assert send("1000000000", "two") == 400
    for number in range(66):
        send("0", f"stroke{number}")
    assert len(component.blob_storage) <= 64


def site_component(site: Served, number: int) -> MaskEditor:
    import gc

    found = [item for item in gc.get_objects() if isinstance(item, MaskEditor) and item._id == number]
    return max(found, key=lambda item: len(item.blob_storage))
