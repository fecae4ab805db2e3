"""The Dockerfile: linted, complete, and its steps taken in a clean folder up to a picture from the server.

There need not be a Docker daemon. What `test_the_image_draws` does in its place is said there.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def steps() -> list[tuple[str, str]]:
    """(instruction, its text) in order; comments left out, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines if line)]


def all_of(instruction: str) -> list[str]:
    return [text for word, text in steps() if word == instruction]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for text in all_of("ENV") for pair in shlex.split(text))


def copied() -> list[tuple[list[str], str]]:
    pairs = [[word for word in text.split() if not word.startswith("--")] for text in all_of("COPY")]
    return [(words[:-1], words[-1]) for words in pairs]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository into the build: the last pattern that matches decides."""
    inside = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parents = [*map(str, list(Path(path).parents)[:-1]), path]
            names = [Path(path).name] if "**/" in line else []
            matches = (fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for name in parents)
            if any(matches) or any(fnmatch.fnmatch(name, pattern) for name in names):
                inside = line.startswith("!")
    return inside


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_a_user_and_can_be_stopped() -> None:
    assert all_of("USER")[-1] not in ("root", "0")
    (entry,) = all_of("ENTRYPOINT")
    assert json.loads(entry) == ["python", "app/app.py"]  # a shell between would keep SIGTERM from Python
    assert not all_of("CMD")
    (health,) = all_of("HEALTHCHECK")
    assert "/healthz" in health and json.loads(health[health.index("[") :])[0] == "python"
    values = environment()
    assert values["HF_HOME"] == "/root/.cache/huggingface"  # where the README mounts the cache
    assert (values["DEMO_HOST"], values["DEMO_PORT"], values["APP_CONTEXT"]) == ("0.0.0.0", "12345", "1024")
    assert all_of("EXPOSE") == [values["DEMO_PORT"]]


def test_the_build_sees_what_it_copies_and_nothing_private() -> None:
    for sources, _ in copied():
        assert all(in_context(source) for source in sources), sources
    assert in_context("diffusion/models/pixart.py")
    assert in_context("output/pretrained_models/emoji-256/transformer/config.json")
    outside = [
        ".git/config",
        "data/emoji/metadata.jsonl",
        "output/demo/train_log.log",
        ".venv/bin/python",
        "tests/tiny.py",
    ]
    outside += ["output/pretrained_models/PixArt-XL-2-512x512.pth", "diffusion/models/__pycache__/pixart.pyc", ".env"]
    assert [path for path in outside if in_context(path)] == []


def test_compose() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    volumes = {volume.split(":")[1] for service in compose["services"].values() for volume in service["volumes"]}
    assert "/root/.cache/huggingface" in volumes
    for service in compose["services"].values():
        assert service["ports"] == ["12345:12345"]
        assert service["tmpfs"] == ["/tmp"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
        named = [volume.split(":")[0] for volume in service["volumes"] if not volume.startswith((".", "/"))]
        assert set(named) <= set(compose["volumes"])
    offline = compose["services"]["offline"]
    assert offline["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "./output/pretrained_models:/workspace/output/pretrained_models:ro" in offline["volumes"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (ROOT / "app/app.py").is_file(), reason="app/app.py, the image's entry, is not here")
def test_the_image_draws(tmp_path: Path) -> None:
    """COPY, the pip step, ENV, HEALTHCHECK, ENTRYPOINT and `docker stop`, as the Dockerfile says them.

    Replaced: the base image by this interpreter; downloads by the packages that it has (`--no-deps`, into a folder, as
    an editable install would change this environment); the user step by the user of the tests; /root and /tmp by
    folders.
    """
    gradio_client = pytest.importorskip("gradio_client")
    workspace, site = tmp_path / "workspace", tmp_path / "site"
    workspace.mkdir()
    for sources, target in copied():
        for source in sources:
            place = workspace / target / (source if target == "./" and (ROOT / source).is_file() else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, workspace / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    (install,) = (text for text in all_of("RUN") if text.startswith("pip install"))
    words = shlex.split(install.replace("${TORCH_INDEX}", "https://pypi.org/simple"))
    assert words[-2:] == ["-e", ".[app]"]
    replaced = [sys.executable, "-m", *words[:-2], "--no-deps", "--no-build-isolation", "--target", str(site), ".[app]"]
    subprocess.run([*replaced, "--quiet"], cwd=workspace, check=True, timeout=500)

    values = environment() | {"DEMO_HOST": "127.0.0.1", "DEMO_PORT": str(free_port()), "PYTHONPATH": str(site)}
    values |= {"HF_HOME": str(tmp_path / "cache"), "GRADIO_TEMP_DIR": str(tmp_path / "tmp"), "HF_HUB_OFFLINE": "1"}
    values = {**os.environ, **values, "OMP_NUM_THREADS": "2"}
    entry = [sys.executable, *json.loads(all_of("ENTRYPOINT")[0])[1:]]
    health = all_of("HEALTHCHECK")[0]
    check = [sys.executable, *json.loads(health[health.index("[") :])[1:]]
    server = subprocess.Popen(entry, cwd=workspace, env=values, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 300
        while subprocess.run(check, env=values, capture_output=True, check=False).returncode:
            assert server.poll() is None, server.stderr.read() if server.stderr else ""
            assert time.monotonic() < until, "the page never became healthy"
            time.sleep(0.5)
        client = gradio_client.Client(
            f"http://127.0.0.1:{values['DEMO_PORT']}", verbose=False, download_files=str(tmp_path / "drawn")
        )
        client.predict(prompt="red apple", width=64, height=64, steps=2, api_name="/draw")
        (picture,) = (workspace / "output/online_demo_img").rglob("*.png")
        assert picture.stat().st_size > 1000
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
