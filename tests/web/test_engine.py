"""The worker behind the page, with a tiny model."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import PromptError
from diffusion.images import decode_image
from diffusion.inference.recipe import read_recipe
from diffusion.web.asking import Asked
from diffusion.web.engine import Engine
from diffusion.web.jobs import FINAL, Job, Progress
from diffusion.web.settings import Limits
from tests.web.serving import make_engine

SMALL = {"width": 64, "height": 64, "steps": 2}


class Client:
    """Asks an engine and keeps what it hears."""

    def __init__(self, engine: Engine, user: str = "me") -> None:
        self.engine, self.user, self.heard = engine, user, queue.SimpleQueue[Progress]()

    def ask(self, prompt: str = "red apple", **asked: Any) -> Job:
        return self.engine.submit(Asked(prompt, **{**SMALL, **asked}), self.user, self.user, self.heard.put)

    def until(self, *stages: str) -> list[Progress]:
        """Everything up to one of these stages."""
        heard: list[Progress] = []
        while not heard or heard[-1].stage not in stages:
            heard.append(self.heard.get(timeout=60))
        return heard

    def end(self) -> Progress:
        return self.until(*FINAL)[-1]


@pytest.fixture
def engine(tiny_model: Path, control_file: Path, tmp_path: Path) -> Any:
    limits = Limits(max_side_px=512, max_waiting=3, max_waiting_per_user=2)
    made = make_engine(tiny_model, tmp_path, control_file, limits=limits)
    yield made
    made.close()


class Held:
    """While it is held the worker draws nothing: requests wait."""

    def __init__(self, engine: Engine) -> None:
        self.free, self.entered, self._draw = threading.Event(), threading.Event(), engine.artist.draw
        engine.artist.draw = self.draw  # type: ignore[method-assign]

    def draw(self, job: Job) -> None:
        self.entered.set()
        assert self.free.wait(60)
        self._draw(job)


def test_pictures_recipes_and_steps(engine: Engine) -> None:
    engine.start()
    client = Client(engine)
    client.ask("red apple", seed=5, pictures=2, style="Anime")
    heard = client.until(*FINAL)
    drawing = [(told.picture, told.step) for told in heard if told.stage == "drawing"]
    assert drawing == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert all((told.preview is not None) == (told.step > 0) for told in heard if told.stage == "drawing")
    done = heard[-1]
    assert done.stage == "done" and done.seeds == (5, 6) and len(done.paths) == 2
    recipe = read_recipe(done.paths[1])
    assert recipe["seed"] == 6 and "anime picture of red apple" in recipe["prompt"]
    assert recipe["asked"]["prompt"] == "red apple" and recipe["asked"]["style"] == "Anime"
    assert recipe["model_fingerprint"] and recipe["versions"]["torch"]


def test_many_clients_get_their_own_pictures(engine: Engine, tmp_path: Path) -> None:
    """Each picture is the one that its seed gives alone."""
    engine.start()
    clients = [Client(engine, f"user{number}") for number in range(4)]
    for number, client in enumerate(clients):
        while True:
            try:
                client.ask(f"a cat {number}", seed=number, solver="sa-solver", steps=3)
                break
            except PromptError:  # three wait already
                clients[number - 3].until("drawing")
    drawn = [decode_image(client.end().paths[0]) for client in clients]
    pipeline = engine.artist.pipeline
    for number, picture in enumerate(drawn):
        from diffusion.inference.solvers import make_scheduler

        pipeline.scheduler = make_scheduler("sa-solver", base_config=pipeline.scheduler.config)
        alone = pipeline(f"a cat {number}", seed=number, num_inference_steps=3, height=64, width=64).images[0]
        assert np.array_equal(np.asarray(alone), np.asarray(picture))


def test_places_limits_and_cancelling(engine: Engine) -> None:
    held = Held(engine)
    engine.start()
    first, second, third = Client(engine, "a"), Client(engine, "b"), Client(engine, "c")
    first.ask()
    assert held.entered.wait(30)
    second.ask()
    second.ask()
    third.ask()
    assert third.until("waiting")[-1].place == 2  # before the second request of the other
    with pytest.raises(PromptError, match="places in the queue"):
        Client(engine, "d").ask()
    assert engine.cancel("b") == 2
    assert engine.cancel("nobody") == 0
    held.free.set()
    assert first.end().stage == "done"
    assert second.end().stage == "stopped" and third.end().stage == "done"
    text = engine.metrics.text().decode()
    assert 'pixart_requests_total{outcome="stopped"} 2.0' in text
    assert 'pixart_requests_total{outcome="refused"} 1.0' in text
    assert "pixart_waiting_requests 0.0" in text


def test_a_stop_holds_for_requests_that_came_before_it_and_are_late(engine: Engine) -> None:
    engine.start()
    client = Client(engine)

    def ask(arrival: float) -> str:
        engine.submit(Asked("red apple", **SMALL), "me", "me", client.heard.put, arrival)
        return client.end().stage

    assert engine.cancel("me", arrival=10.0) == 0
    assert [ask(9.0), ask(11.0)] == ["stopped", "done"]
    engine.cancel("me", arrival=8.0)  # overtaken by a later one
    assert ask(9.0) == "stopped"
    for number in range(1100):
        engine.cancel(f"tab{number}")
    assert len(engine._cancelled) <= 1000
    assert 'pixart_requests_total{outcome="stopped"} 2.0' in engine.metrics.text().decode()


def test_a_user_has_a_share_of_the_queue(engine: Engine) -> None:
    held = Held(engine)
    engine.start()
    client = Client(engine)
    client.ask()
    assert held.entered.wait(30)
    client.ask()
    client.ask()
    with pytest.raises(PromptError, match="of your requests"):
        client.ask()
    held.free.set()
    assert [client.end().stage for _ in range(3)] == ["done"] * 3


def test_stop_while_drawing_keeps_the_pictures_before(engine: Engine) -> None:
    engine.start()
    client = Client(engine)
    client.ask(steps=100, pictures=8)
    while client.until("drawing")[-1].picture < 2:
        pass
    engine.cancel("me")
    stopped = client.end()
    assert stopped.stage == "stopped" and 1 <= len(stopped.paths) < 8
    client.ask()
    assert client.end().stage == "done"


def test_pictures_to_begin_from(engine: Engine) -> None:
    engine.start()
    client, white = Client(engine), Image.new("RGB", (64, 64), "white")
    client.ask(mode="image", image=white, strength=0.5, steps=4)
    heard = client.until(*FINAL)
    assert [told.step for told in heard if told.stage == "drawing"] == [0, 1, 2]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    client.ask(mode="inpaint", image=white, mask=mask, strength=1.0)
    pixels = np.asarray(decode_image(client.end().paths[0]))
    assert (pixels[:, 32:] == 255).all() and (pixels[:, :32] < 255).any()
    client.ask(mode="edges", control_image=white, seed=1)
    assert read_recipe(client.end().paths[0])["controlnet_fingerprint"]
    assert engine.edges(white, 64, 48).size == (48, 64)


def test_directives_obey_the_limit(engine: Engine) -> None:
    engine.start()
    client = Client(engine)
    client.ask("red apple --hw 4096:4096")
    failed = client.end()
    assert failed.stage == "failed" and failed.message  # a model of 64 px has no table of sizes
    client.ask()
    assert client.end().stage == "done"


def test_a_fault_is_told_and_the_next_request_served(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.start()
    broken = engine.artist
    broken.pipeline.transformer.predict = lambda *_, **__: 1 / 0
    client = Client(engine)
    client.ask("a secret garden")
    failed = client.end()
    assert failed.stage == "failed" and "ZeroDivision" not in failed.message
    client.ask()
    assert client.end().stage == "done"
    assert engine.artist is not broken and engine.healthy
    assert "ZeroDivisionError" in caplog.text and "secret garden" not in caplog.text


def test_a_log_that_cannot_be_written_keeps_no_picture_back(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.start()
    handler, logger, client = (
        logging.FileHandler(tmp_path / "gone.log"),
        logging.getLogger("pixart.web"),
        Client(engine),
    )
    handler.close()
    handler.baseFilename = str(tmp_path / "gone/page.log")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "pixart.web"):
            for _ in range(2):
                client.ask()
                assert client.end().stage == "done"
    finally:
        logger.removeHandler(handler)
    assert "gone/page.log" in capfd.readouterr().err


def test_a_pipeline_that_cannot_be_loaded_again_is_said(engine: Engine) -> None:
    engine.start()
    engine.artist.pipeline.transformer.predict = lambda *_, **__: 1 / 0
    engine._build = lambda: 1 / 0  # type: ignore[assignment,return-value]
    client = Client(engine)
    client.ask()
    assert client.end().stage == "failed"
    assert not engine.healthy
    with pytest.raises(PromptError, match="started again"):
        client.ask()


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_logged_only_when_asked_for(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    caplog.set_level(logging.INFO)
    engine = make_engine(tiny_model, tmp_path, log_prompts=wanted)
    engine.start()
    try:
        client = Client(engine)
        client.ask("orchid " * 250)  # longer than T5 reads, so the pipeline has a notice that quotes it
        done = client.end()
    finally:
        engine.close()
    assert any("orchid" in notice for notice in done.notices)
    assert ("orchid" in caplog.text) == wanted
    assert wanted or "1750 characters" in caplog.text


def test_only_the_newest_pictures_stay(tiny_model: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_model, tmp_path, keep_pictures=2)
    engine.start()
    try:
        client = Client(engine)
        client.ask(pictures=3)
        done = client.end()
    finally:
        engine.close()
    assert [path.exists() for path in done.paths] == [False, True, True]


def test_loras_are_offered_by_name_and_need_a_pipeline_that_takes_them(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "watercolour").mkdir(parents=True)
    (folder / "watercolour/pytorch_lora_weights.safetensors").touch()
    (folder / "pencil.safetensors").touch()
    loras = engine.artist.loras
    assert loras.names() == ["pencil", "watercolour"]

    class Takes:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def load_lora_weights(self, path: str, adapter_name: str) -> None:
            self.calls.append(Path(path).name)

        def set_adapters(self, names: list[str], weights: list[float]) -> None:
            self.calls.append(weights[0])

        def unload_lora_weights(self) -> None:
            self.calls.append("unload")

    pipeline = Takes()
    assert loras.apply(pipeline, "pencil", 0.5) == {"lora": "pencil", "lora_scale": 0.5}
    loras.apply(pipeline, "pencil", 0.7)
    loras.apply(pipeline, "watercolour", 1.0)
    assert loras.apply(pipeline, None, 1.0) == {}
    assert pipeline.calls == ["pencil.safetensors", 0.5, 0.7, "unload", "watercolour", 1.0, "unload"]
    with pytest.raises(PromptError, match="charcoal"):
        loras.apply(pipeline, "charcoal", 1.0)
    with pytest.raises(PromptError, match=r"\.\./pencil"):
        loras.apply(pipeline, "../pencil", 1.0)
    with pytest.raises(PromptError, match="without LoRA"):
        loras.apply(object(), "pencil", 1.0)
