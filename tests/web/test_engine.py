"""The worker behind the page, with a tiny model."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion.adapters import DIFFUSERS_WEIGHTS, injection
from diffusion.errors import PromptError
from diffusion.images import decode_image
from diffusion.inference.recipe import read_recipe
from diffusion.web.asking import Asked
from diffusion.web.engine import Engine
from diffusion.web.jobs import FINAL, Job, Progress
from diffusion.web.settings import Limits
from tests.inference.test_control import DEPTH
from tests.inference.tiny_pipeline import write_tiny_adapter
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


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """The folder that `engine` offers: two LoRAs of its model, one of a wider network, one that is damaged within."""
    folder, made = tmp_path / "loras", tmp_path / "made"
    folder.mkdir()
    write_tiny_adapter(made, depth=DEPTH).rename(folder / "pencil.safetensors")
    write_tiny_adapter(folder / "watercolour", seed=1, depth=DEPTH)
    write_tiny_adapter(made, depth=DEPTH, hidden_size=64).rename(folder / "wider.safetensors")
    write_tiny_adapter(made, depth=DEPTH, use_dora=True)
    tensors = load_file(made / DIFFUSERS_WEIGHTS)
    last = next(name for name in tensors if name.startswith("transformer.proj_out") and "magnitude" in name)
    save_file({**tensors, last: tensors[last][:-1]}, folder / "damaged.safetensors")
    return folder


class Drawing:
    """Asks an engine for the same picture again and again, with and without a LoRA."""

    def __init__(self, engine: Engine) -> None:
        self.client = Client(engine)

    def __call__(self, **asked: Any) -> tuple[bytes, dict[str, Any]]:
        """Its pixels, and what its recipe says of a LoRA."""
        self.client.ask(seed=7, **asked)
        done = self.client.end()
        assert done.stage == "done", done.message
        said = {name: value for name, value in read_recipe(done.paths[0]).items() if name.startswith("lora")}
        return decode_image(done.paths[0]).tobytes(), said

    def refused(self, **asked: Any) -> str:
        self.client.ask(seed=7, **asked)
        done = self.client.end()
        assert done.stage == "failed" and not done.paths
        return done.message


def test_a_chosen_lora_draws_and_without_it_the_base_draws_bit_for_bit(engine: Engine, loras: Path) -> None:
    engine.start()
    draw = Drawing(engine)
    base = draw()
    assert base[1] == {}
    pencil, said = draw(lora="pencil")
    assert said == {"lora": "pencil", "lora_scale": 1.0}
    assert draw() == base
    half, said = draw(lora="pencil", lora_scale=0.5)
    assert said == {"lora": "pencil", "lora_scale": 0.5}
    assert draw(lora="pencil")[0] == pencil
    watercolour, said = draw(lora="watercolour")
    assert said == {"lora": "watercolour", "lora_scale": 1.0}
    assert len({base[0], pencil, half, watercolour}) == 4
    assert draw(lora="watercolour", lora_scale=0.0) == base
    edges = {"mode": "edges", "control_image": Image.new("RGB", (64, 64), "white")}
    assert len({draw(**edges)[0], draw(**edges, lora="pencil")[0], pencil, base[0]}) == 4
    assert draw() == base


def test_a_lora_that_does_not_fit_is_refused_and_the_page_draws_as_before(engine: Engine, loras: Path) -> None:
    assert engine.artist.loras.names() == ["damaged", "pencil", "watercolour", "wider"]
    engine.start()
    artist, draw = engine.artist, Drawing(engine)
    base, pencil = draw(), draw(lora="pencil")
    message = draw.refused(lora="wider")
    assert "wider.safetensors was made for another model than this one of width 48" in message
    assert "layers of another size: " in message
    assert draw() == base
    assert "proj_out (adapter (31,) magnitudes, model (32, 48))" in draw.refused(lora="damaged")
    assert "'charcoal' is not in " in draw.refused(lora="charcoal")
    assert "'../pencil' is not in " in draw.refused(lora="../pencil")
    assert draw(lora="pencil") == pencil
    (loras / "pencil.safetensors").rename(loras / "charcoal.safetensors")
    (loras / "watercolour" / DIFFUSERS_WEIGHTS).write_bytes(b"")
    assert "is no readable safetensors file" in draw.refused(lora="watercolour")
    assert draw() == base
    assert draw(lora="charcoal")[0] == pencil[0]
    write_tiny_adapter(loras.parent / "again", seed=2, depth=DEPTH).replace(loras / "charcoal.safetensors")
    assert draw(lora="charcoal")[0] not in (pencil[0], base[0])  # the new file is read
    assert engine.artist is artist  # the pipeline was never loaded again


def test_a_lora_that_fails_half_way_leaves_nothing_behind(
    engine: Engine, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artist, asked = engine.artist, Asked("red apple", **SMALL)
    pipeline, network = artist.pipeline, artist.pipeline.transformer

    def draw() -> bytes:
        job = Job(asked, "me", "me", lambda _: None)
        artist.draw(job)
        return decode_image(job.paths[0]).tobytes()

    base, layers = draw(), {name: type(module) for name, module in network.named_modules()}
    with monkeypatch.context() as patched:
        patched.setattr(injection, "write_factors", Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            artist.loras.apply(pipeline, "pencil", 1.0)
    assert {name: type(module) for name, module in network.named_modules()} == layers
    assert draw() == base
    artist.loras.apply(pipeline, "pencil", 1.0)
    artist.loras.apply(pipeline, None, 1.0)
    assert draw() == base
