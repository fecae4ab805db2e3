"""The page in a real Chromium, with a tiny model.

`SCREENSHOTS=docs/images pytest -m slow tests/web/test_browser.py` also writes the pictures of docs/apps.md; the run
that they show is the one of `make demo`, or RUN.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.images import decode_image
from diffusion.inference.recipe import read_recipe, save_png
from tests.web.browser import FLAGS, find_chromium
from tests.web.serving import Served, make_engine, row, run_served, served

pytestmark = [pytest.mark.slow, pytest.mark.alone]
ROOT = Path(__file__).parents[2]
APPLE = ROOT / "data/emoji/images/1f34e.webp"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: `make browser`, or CHROMIUM=/path, runs the tests of the page")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


_OF_THE_EDITOR = "(reading 'canvas')"  # gradio's, when it leaves the page while it still loads, on a busy machine


class Tab:
    """The page in a tab, and everything that went wrong in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.problems = page, list[str]()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on("pageerror", lambda error: _OF_THE_EDITOR not in str(error) and self.problems.append(str(error)))
        page.on("response", lambda answer: answer.status >= 400 and self.problems.append(answer.url))
        page.on("request", lambda request: self._require_own(request.url, url))
        page.goto(url)
        page.locator("#prompt textarea").wait_for()

    def _require_own(self, wanted: str, url: str) -> None:
        if not wanted.startswith((url, "data:", "blob:")):
            self.problems.append(f"fetched from elsewhere: {wanted}")

    def fill(self, prompt: str, *, steps: int = 2, pictures: int = 1) -> None:
        self.page.locator("#prompt textarea").fill(prompt)
        self.number("steps", steps)
        self.number("pictures", pictures)

    def number(self, name: str, value: int) -> None:
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def draw(self) -> None:
        """Draw, and wait until it is done."""
        before = self.drawn
        self.page.get_by_role("button", name="Draw", exact=True).click()
        self.page.wait_for_function(
            "before => { const stage = document.querySelector('#stage .done');"
            " return stage && document.querySelector('#seed input').value !== before; }",
            arg=before,
        )

    @property
    def drawn(self) -> str:
        return str(self.page.locator("#seed input").input_value())

    def value(self, name: str) -> str:
        return str(self.page.locator(f"#{name} input, #{name} textarea").first.input_value())


@pytest.fixture
def tab(browser: Any, site: Served) -> Iterator[Tab]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = Tab(context.new_page(), site.url)
    yield opened
    context.close()
    assert opened.problems == []


def test_generate_download_and_reuse(tab: Tab, tmp_path: Path) -> None:
    tab.fill("red apple", pictures=2)
    tab.draw()
    page = tab.page
    assert "2 pictures in" in page.locator("#stage").inner_text()
    seed = int(tab.drawn)
    thumbnails = page.locator("#gallery [data-testid^='thumbnail ']")
    thumbnails.nth(1).wait_for()
    assert thumbnails.count() == 2
    with page.expect_download() as caught:
        page.locator("#download").click()
    caught.value.save_as(tmp_path / "picture.png")
    recipe = read_recipe(tmp_path / "picture.png")
    assert recipe["asked"]["prompt"] == "red apple" and recipe["seed"] == seed + 1  # the newest is in front
    page.get_by_role("button", name="Recipe").click()
    assert str(seed + 1) in page.locator("#recipe").inner_text()
    thumbnails.nth(1).click()
    page.wait_for_function("seed => document.querySelector('#recipe').innerText.includes(seed)", arg=f"{seed}\n")
    tab.fill("something else", steps=5)
    page.locator("#reuse").click()
    page.wait_for_function("() => document.querySelector('#prompt textarea').value === 'red apple'")
    assert (tab.value("seed"), tab.value("steps")) == (str(seed), "2")
    assert not page.get_by_label("New seed for each drawing").is_checked()
    # The settings of a file, after a reload has emptied the page.
    page.reload()
    page.locator("#prompt textarea").wait_for()
    page.get_by_role("button", name="Recipe").click()
    page.locator("#recipe-upload input[type=file]").set_input_files(tmp_path / "picture.png")
    page.wait_for_function("() => document.querySelector('#prompt textarea').value === 'red apple'")
    assert tab.value("seed") == str(seed + 1)


def test_progress_previews_and_stop(tab: Tab, site: Served) -> None:
    tab.fill("red apple", steps=100, pictures=8)
    tab.number("width", 256)
    tab.number("height", 256)
    page = tab.page
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#stage .drawing img").wait_for()
    shown = page.locator("#stage progress")
    assert int(shown.get_attribute("max")) == 100 and 0 <= int(shown.get_attribute("value")) <= 100
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator("#stage .stopped").wait_for()
    assert "Stopped" in page.locator("#stage").inner_text()
    tab.number("steps", 2)
    tab.number("pictures", 1)
    tab.draw()


def test_a_closed_tab_frees_the_worker(browser: Any, site: Served) -> None:
    context = browser.new_context()
    tab = Tab(context.new_page(), site.url)
    tab.fill("red apple", steps=100, pictures=8)
    tab.number("width", 512)
    tab.page.get_by_role("button", name="Draw", exact=True).click()
    tab.page.locator("#stage .drawing").wait_for()
    context.close()
    worker = site.engine
    deadline = time.monotonic() + 120
    while worker.is_drawing:
        assert time.monotonic() < deadline, "the request of a tab that was closed is still drawn"
        time.sleep(0.1)


def test_inpaint(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    page.get_by_label("Part of a picture").check()
    with page.expect_file_chooser() as chooser:
        page.locator("#painted").get_by_role("button", name="Upload").click()
    chooser.value.set_files(APPLE)
    page.locator("#painted").get_by_role("button", name="Undo").wait_for()
    page.wait_for_timeout(1500)  # the editor scales the picture in, and shows nothing to wait for
    page.locator("#painted").get_by_role("button", name="Brush", exact=True).click()
    box = page.locator("#painted canvas").first.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(middle[0] - 30, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1], steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    tab.fill("green apple")
    tab.number("width", 256)
    tab.number("height", 256)
    tab.draw()
    with page.expect_download() as caught:
        page.locator("#download").click()
    caught.value.save_as(tmp_path / "painted.png")
    before, after = (np.asarray(decode_image(path)).astype(int) for path in (APPLE, tmp_path / "painted.png"))
    changed = np.abs(before - after).max(axis=2) > 8
    assert changed[118:138, 118:138].mean() > 0.9  # under the stroke
    assert changed[:32].mean() < 0.01 and changed[-32:].mean() < 0.01  # far from it


def test_image_to_image_and_begin_from_a_result(tab: Tab) -> None:
    page = tab.page
    page.get_by_label("A picture", exact=True).check()
    page.locator("#image input[type=file]").set_input_files(APPLE)
    page.locator("#image img").wait_for()
    tab.fill("red apple", steps=4)
    tab.draw()
    page.get_by_label("Words alone").check()
    page.locator("#begin").click()
    page.locator("#image img").wait_for()
    assert page.get_by_label("A picture", exact=True).is_checked()
    tab.draw()


def test_controlnet_with_a_preview_of_the_condition(tab: Tab, tmp_path: Path) -> None:
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[30:34] = 255
    Image.fromarray(lines).save(tmp_path / "edges.png")
    page = tab.page
    page.get_by_label("Edges of a picture").check()
    page.locator("#control input[type=file]").set_input_files(tmp_path / "edges.png")
    page.locator("#edges img").wait_for()
    tab.fill("red apple")
    tab.draw()
    page.get_by_role("button", name="Recipe").click()
    assert "Condition strength" in page.locator("#recipe").inner_text()


def test_what_is_wrong_is_said_and_drawing_goes_on(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    assert all(page.locator(f"#{name}").is_disabled() for name in ("download", "reuse", "begin"))  # no picture yet
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#stage .failed").get_by_text("The prompt is empty").wait_for()
    page.get_by_label("A picture", exact=True).check()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.locator("#image input[type=file]").set_input_files(tmp_path / "bad.png")
    page.locator("#image img, #image video").first.wait_for(state="attached")
    tab.fill("red apple")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("This picture cannot be used").first.wait_for()
    assert "Traceback" not in page.content()
    page.get_by_label("Words alone").check()
    tab.draw()
    page.locator("#reuse:enabled").wait_for()


def test_a_recipe_of_a_stranger_is_refused_and_is_no_markup(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    page.get_by_role("button", name="Recipe").click()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#recipe-upload input[type=file]").set_input_files(tmp_path / "plain.png")
    page.get_by_text("This picture carries no recipe").wait_for()
    page.reload()
    page.get_by_role("button", name="Recipe").click()
    markup = "<img src=x onerror=alert(1)>"
    save_png(Image.new("RGB", (8, 8)), tmp_path / "evil.png", {"asked": {"prompt": "fox", "style": markup}})
    page.locator("#recipe-upload input[type=file]").set_input_files(tmp_path / "evil.png")
    page.get_by_text(f"Style '{markup}' is unknown").wait_for()
    assert page.locator("img[src=x]").count() == 0


def test_by_keyboard_alone(tab: Tab) -> None:
    """From the top: the theme button, the prompt, Draw; Shift+Enter draws too."""
    page = tab.page
    tab.number("steps", 2)
    seen = []
    page.locator("#theme-button").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.closest('[id]').id"))
        if page.evaluate("document.activeElement.matches('#prompt textarea')"):
            page.keyboard.type("red apple")
        if page.evaluate("document.activeElement.matches('#draw-button')"):
            break
    assert seen[-1] == "draw-button", seen
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    page.locator("#stage .done").wait_for()
    seed = tab.drawn
    page.locator("#prompt textarea").press("Shift+Enter")
    page.wait_for_function("seed => document.querySelector('#seed input').value !== seed", arg=seed)


def test_the_next_prompt_can_be_typed_while_a_picture_is_drawn(tab: Tab) -> None:
    page = tab.page
    tab.fill("red apple")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#prompt textarea").fill("")
    page.locator("#prompt textarea").focus()
    page.locator("#download:not([disabled])").wait_for()  # the last thing that a picture changes
    page.wait_for_timeout(1000)
    page.keyboard.type("green frog")
    assert tab.value("prompt") == "green frog"
    page.evaluate("""() => {  // a picture that is done at once, before the press of Draw is 0.3 s old
      document.querySelector('#draw-button').dispatchEvent(new PointerEvent('pointerdown', {bubbles: true}));
      document.querySelector('#prompt textarea').focus();
      document.querySelector('#gallery .thumbnail-item').focus();
    }""")
    page.keyboard.type("s")
    assert tab.value("prompt") == "green frogs"
    page.locator("#gallery .thumbnail-item").first.click()  # of one's own will the focus goes there
    assert page.evaluate("!!document.activeElement.closest('#gallery')")


_NAMELESS = """() => {
  const named = e => {
    const by = (e.getAttribute('aria-labelledby') || '').split(' ').map(i => document.getElementById(i)?.innerText);
    const texts = [e.getAttribute('aria-label'), e.title, ...by, ...[...(e.labels || [])].map(l => l.innerText),
      e.closest('label')?.innerText, e.tagName === 'BUTTON' ? e.innerText || e.querySelector('img')?.alt : ''];
    return texts.some(text => text && text.trim());
  };
  return [...document.querySelectorAll('input, textarea, select, button')]
    .filter(e => e.offsetParent !== null && !named(e)).map(e => e.outerHTML.slice(0, 300));
}"""


def test_every_input_has_a_name(tab: Tab) -> None:
    page = tab.page
    tab.fill("red apple")
    tab.draw()
    page.get_by_role("button", name="Recipe").click()
    for mode in ("Words alone", "A picture", "Part of a picture", "Edges of a picture"):
        page.get_by_label(mode, exact=True).check()
        assert page.evaluate(_NAMELESS) == [], mode
    assert page.evaluate(
        "[...document.querySelectorAll('#gallery img, #stage img')].every(image => image.hasAttribute('alt'))"
    )


def test_phone(browser: Any, site: Served) -> None:
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    tab = Tab(context.new_page(), site.url)
    tab.fill("red apple")
    tab.draw()
    tab.page.wait_for_function("() => document.querySelector('#stage').getBoundingClientRect().top < innerHeight / 2")
    width = tab.page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"], f"the page is {width} px wide"
    assert tab.page.get_by_role("button", name="Draw", exact=True).bounding_box()["height"] >= 44
    context.close()
    assert tab.problems == []


def test_dark_and_light(tab: Tab) -> None:
    page = tab.page
    colour = "getComputedStyle(document.querySelector('gradio-app')).backgroundColor"

    def brightness() -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate(colour))[:3]))

    light = brightness() > 600
    page.get_by_role("button", name="Dark / light").click()
    sum_now = f"{colour}.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0)"
    page.wait_for_function(f"light => ({sum_now} > 600) !== light", arg=light)  # colours fade into each other
    assert (brightness() > 600) is not light


def test_the_page_of_a_training_run(browser: Any, run: Path, address: str) -> None:
    context = browser.new_context(viewport=PHONE)
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.locator("#curve-loss path").first.wait_for()
    assert (
        "Time left" in page.locator("#figures").inner_text() and "2000 of 4000" in page.locator("#figures").inner_text()
    )
    assert page.get_by_role("img", name=re.compile("Loss from step")).count() == 1
    assert page.locator("#grid-step").inner_text() == "step 1000"
    page.get_by_label("Validation grid over time").press("ArrowLeft")
    assert page.locator("#grid-step").inner_text() == "step 200"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row(2001))
    page.get_by_text("2001 of 4000").wait_for()  # by itself, within two seconds
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate(_NAMELESS) == [] and problems == []
    context.close()


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="set SCREENSHOTS=docs/images to draw them")
@pytest.mark.timeout(600)
def test_screenshots(browser: Any, tmp_path: Path) -> None:
    """Pictures of docs/apps.md, with the bundled model."""
    folder = Path(os.environ["SCREENSHOTS"])
    with served(make_engine(ROOT / "output/pretrained_models/emoji-256", tmp_path)) as site:
        context = browser.new_context(viewport={"width": 1280, "height": 960})
        tab = Tab(context.new_page(), site.url)
        tab.page.set_default_timeout(150_000)
        for example in (1, 6, 2):
            tab.page.locator("#examples .thumbnail-item").nth(example).click()
            tab.page.wait_for_timeout(800)
            tab.page.get_by_role("button", name="Draw", exact=True).click()
            tab.page.locator("#stage .drawing").wait_for()
            tab.page.locator("#stage .done").wait_for()
        tab.page.evaluate("window.scrollTo(0, 0)")
        tab.page.wait_for_timeout(1500)
        tab.page.screenshot(path=tmp_path / "light.png")
        tab.page.get_by_role("button", name="Dark / light").click()
        tab.page.wait_for_timeout(600)
        tab.page.set_viewport_size(PHONE)
        tab.page.wait_for_timeout(800)
        tab.page.evaluate("document.querySelector('#stage').scrollIntoView()")
        tab.page.wait_for_timeout(500)
        tab.page.screenshot(path=tmp_path / "phone.png")
        context.close()
    with run_served(Path(os.environ.get("RUN", ROOT / "output/demo"))) as address:
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.goto(address)
        page.locator("#curve-loss path").first.wait_for()
        page.screenshot(path=tmp_path / "run-page.png")
        page.close()
    for shot, name, width in (("light", "app-light", 1000), ("phone", "app-phone", 360), ("run-page", "run-page", 900)):
        with Image.open(tmp_path / f"{shot}.png") as picture:
            height = picture.height * width // picture.width
            small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            small.quantize(192).save(folder / f"{name}.png", optimize=True)
