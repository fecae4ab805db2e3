"""What is a name of the hub, and what is said, how soon, when the hub does not answer."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from diffusion.checkpoints import hub, open_checkpoint
from diffusion.checkpoints.download import download
from diffusion.checkpoints.hub import hub_file, hub_folder, is_dataset_id, no_such_path, parse_hub_id, why_unreachable
from diffusion.checkpoints.published import find_published
from diffusion.errors import CheckpointError
from tests.checkpoints.hub_server import running_hub

ABSENT = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never says a word, as behind a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("text", "model", "data_set"),
    [
        ("owner/name", ("owner/name", None), True),
        ("owner/name-v1.5", ("owner/name-v1.5", None), True),
        ("owner/name/a/b.pth", ("owner/name", "a/b.pth"), False),
        ("mnist", None, True),
        ("weights/model.safetensors", None, False),
        ("pictures/pokemon.parquet", None, False),
        ("pokemon.parquet", None, False),
        ("pictures/*.parquet", None, False),
        ("a/b/c", ("a/b", "c"), False),
        ("./owner/name", None, False),
        ("../name", None, False),
        ("~/name", None, False),
        ("/absolute/path", None, False),
        ("here/gone", None, False),
        ("here", None, False),
    ],
)
def test_paths_and_names(text: str, model: tuple[str, str | None] | None, data_set: bool, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert parse_hub_id(text) == model
    assert is_dataset_id(text) is data_set


def test_a_path_that_is_not_there_says_where_it_was_sought(tmp_path: Path) -> None:
    assert no_such_path("a/b.pth") == f"a/b.pth: no such folder or file in {tmp_path}"
    assert no_such_path("/a") == "/a: no such folder or file"
    assert no_such_path("~/a") == "~/a: no such folder or file (the shell leaves ~ behind = as it is: write $HOME)"


CALLS: list[Callable[[], object]] = [
    lambda: open_checkpoint("someone/model"),
    lambda: hub_file("someone/model", "model.pth"),
    lambda: hub_folder("someone/model", ["*.json"], "json files"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("silent", [False, True])
def test_no_network_is_said_at_once(
    call: Callable[[], object], silent: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    with silent_server() if silent else contextlib.nullcontext(ABSENT) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        begun = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            call()
        # Alone, the client asks an absent hub for half a minute and waits for a silent one for good.
        assert time.monotonic() - begun < 5
    said = str(caught.value)
    assert said.startswith(f"someone/model is no file or folder here, and {address} could not be reached for ")
    assert ("timed out" if silent else "Connection refused") in said
    assert f"; fetch {address}/someone/model elsewhere and give its local path, or bring the cache" in said
    assert f"to {cache} (with HF_HUB_OFFLINE=1 nothing is asked), or set HF_ENDPOINT to a mirror" in said
    assert "\n" not in said


def test_a_silent_hub_is_asked_once_for_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    with silent_server() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        begun = time.monotonic()
        reasons = [why_unreachable() for _ in range(5)]
        assert 1 <= time.monotonic() - begun < 3
        assert len(set(reasons)) == 1 and "timed out" in str(reasons[0])
    monkeypatch.setattr(hub, "_REMEMBERED_S", 0.0)
    assert "timed out" not in str(why_unreachable()), "it is asked again after a while"


def test_offline_by_wish_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"for model\.pth \(HF_HUB_OFFLINE is set, unset it to ask\); fetch"):
        hub_file("someone/model", "model.pth")


def test_what_the_cache_holds_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub({"someone/model": {"model.pth": b"weights"}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        fetched = hub_file("someone/model", "model.pth")
        folder = hub_folder("someone/model", ["*.pth"], "weights")
    monkeypatch.setenv("HF_ENDPOINT", ABSENT)
    assert hub_file("someone/model", "model.pth") == fetched
    assert hub_folder("someone/model", ["*.pth"], "weights") == folder
    assert fetched.read_bytes() == b"weights"


def test_the_download_tool_does_not_wait_for_a_silent_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    with silent_server() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        message = r"could not be reached for ControlNetHED\.pth of PixArt-alpha/PixArt-alpha \(.*timed out\); .* put it"
        with pytest.raises(CheckpointError, match=message):
            download([find_published("ControlNetHED.pth")], tmp_path)
