"""`make test-browser`: the demo in a real browser."""

import re
import time

import pytest
from PIL import Image

from transdiff_pipelines import DIGITS, TransDiffPipeline
from transdiff_pipelines.generation import GenerationSettings, draw

from .driver import serve


pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]


def few_steps(page, steps=3, count=1):
    """Open the sampler's settings and ask for little work."""
    page.number("#count", count)
    next(button for button in page.find("button.label-wrap") if "Sampler" in button.text).click()
    page.wait(lambda: page.find("#steps input[type=number]")[0].is_displayed())
    page.number("#steps", steps)
    page.wait(lambda: f"--num-inference-steps {steps}" in page.text("#recipe"))


def test_choose_draw_and_download(visit):
    page = visit()
    few_steps(page, count=2)
    page.pick("#classes", "5")
    page.number("#seed", 11)
    page.wait(lambda: "generate 3 7 5 " in page.text("#recipe") and "--seed 11" in page.text("#recipe"))
    images = page.draw()
    assert len(images) == 6
    # Four images to a sequence, all of them shown, for each of the six.
    assert len(page.find("#sequence td img")) == 24

    settings = GenerationSettings.from_image(images[4])
    assert (settings.labels, settings.seed, settings.num_inference_steps) == ((5,), 15, 3)
    assert settings.command_line().split("--")[0] == "transdiff generate 5 "
    again = next(draw(TransDiffPipeline.from_pretrained(DIGITS), settings))
    # A batch of another size rounds differently: a grey level at most.
    assert max(abs(a - b) for a, b in zip(images[4].tobytes(), again.tobytes(), strict=True)) <= 1
    assert page.hosts() == {"127.0.0.1"}


def test_emoji_are_found_by_any_part_of_their_names(visit, tmp_path):
    """The page without a model named: it opens with two classes of the emoji, and finds names of several words."""
    with serve(tmp_path) as (address, _):
        page = visit(address)
        assert "transdiff generate 'dog face' pizza --model emoji " in page.text("#recipe")
        few_steps(page)
        page.pick("#classes", "ice cr")
        page.number("#seed", 7)  # which leaves the list of classes, and that closes
        page.wait(
            lambda: (
                "generate 'dog face' pizza 'ice cream' " in page.text("#recipe") and "--seed 7" in page.text("#recipe")
            )
        )
        assert len(page.draw()) == 3
        assert "ice cream, seed 9" in page.text("#sequence")


def test_the_sequence_appears_image_by_image(visit):
    page = visit()
    few_steps(page, steps=60)
    page.driver.execute_script("""
        window.seen = [];
        const look = () => window.seen.push(
            [...document.querySelectorAll('#sequence td img')].map(image => image.src));
        new MutationObserver(look).observe(document.querySelector('#sequence'),
            {childList: true, subtree: true, attributes: true});
    """)
    page.draw()
    seen = page.driver.execute_script("return window.seen")
    assert {len(sources) // 2 for sources in seen} >= {1, 2, 3, 4}
    first_cell = {sources[0] for sources in seen if sources}
    assert len(first_cell) > 2  # its denoising was seen, not its end alone


def test_blend(visit):
    page = visit()
    few_steps(page)
    page.choose("Blend")
    page.wait(lambda: page.find("#share input[type=number]")[0].is_displayed())
    page.number("#share", 0.25)
    page.wait(lambda: "blend_conditions(parts, [0.75, 0.25])" in page.text("#recipe"))
    assert len(page.draw()) == 1
    assert "75% 3 + 25% 8, seed 0" in page.text("#sequence")


def test_bad_and_good_upload(visit, tmp_path):
    bad, good = tmp_path / "bad.png", tmp_path / "good.png"
    bad.write_bytes(b"not a picture")
    Image.radial_gradient("L").resize((60, 40)).save(good)
    page = visit()
    few_steps(page)
    page.choose("From a picture")
    page.wait(lambda: page.find("#upload input[type=file]"))
    page.click("#draw")
    assert "Upload a picture first" in page.message()
    page.find("[data-testid=toast-close]")[0].click()

    page.find("#upload input[type=file]")[0].send_keys(str(bad))
    page.wait(lambda: "bad" in page.text("#upload"))
    page.wait(lambda: "not a picture that can be read" in page.text("#recipe"))
    page.click("#draw")
    page.wait(lambda: "not a picture that can be read" in page.text("[data-testid=toast-body]"))
    everything = page.text("body")
    assert "Traceback" not in everything
    assert re.search(r"/(tmp|home|work|usr|root)/", everything) is None

    page.find("#upload button[aria-label^=Remove], #upload button[aria-label=Clear]")[0].click()
    page.wait(lambda: page.find("#upload input[type=file]"))
    page.find("#upload input[type=file]")[0].send_keys(str(good))
    page.wait(lambda: "good" in page.text("#upload") and "reference_images" in page.text("#recipe"))
    assert len(page.draw()) == 2
    assert len(page.find("#sequence td img")) == 8


def test_two_visitors_at_once_get_what_each_would_get_alone(visit):
    pages = [visit(), visit()]
    for page, steps in zip(pages, (7, 12), strict=True):
        few_steps(page, steps)
    for page in pages:
        page.start()
    together = [[image.tobytes() for image in page.finish()] for page in pages]
    alone = [[image.tobytes() for image in page.draw()] for page in pages]
    assert together == alone
    assert together[0] != together[1]


def test_stop(visit, server):
    page = visit()
    few_steps(page, steps=100, count=4)
    page.click("#draw")
    page.wait(lambda: "step" in page.text("#sequence [role=status]"))
    page.click("#stop")
    time.sleep(2)  # what was on its way arrives
    stopped_at = page.text("#sequence [role=status]")
    assert "step" in stopped_at
    time.sleep(4)
    assert page.text("#sequence [role=status]") == stopped_at
    page.number("#steps", 2)
    page.wait(lambda: "--num-inference-steps 2" in page.text("#recipe"))
    assert len(page.draw()) == 8
    assert "Traceback" not in server[1].read_text(errors="replace")


def test_phone(visit):
    page = visit(width=390, height=844)
    few_steps(page, count=4)
    page.draw()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert all(image.size["width"] <= 390 for image in page.find("#sequence td img"))
