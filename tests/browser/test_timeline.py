"""The timeline as a page, with the network off."""

import pandas as pd
import pytest

from moekit.notebook import timeline
from moekit.profiling import Profile
from moekit.profiling.table import COLUMNS

pytestmark = pytest.mark.slow


def profile() -> Profile:
    """Two ranks: rank 0 computes for 6 ms and exchanges for 2, rank 1 computes for 3 and waits for 3; twice."""
    rows = []
    for step, zero in enumerate((0.0, 0.008)):
        rows += [
            (0, step, 1, "attention", "flash", zero, 0.006, 0.006, 0, 0),
            (0, step, 1, "dispatch", "_meet", zero + 0.006, 0.002, 0.002, 0, 0),
            (1, step, 1, "attention", "flash", zero, 0.003, 0.003, 0, 0),
            (1, step, 1, "waiting", "_meet", zero + 0.003, 0.003, 0.003, 0, 0),
            (1, step, 1, "dispatch", "_meet", zero + 0.006, 0.002, 0.002, 0, 0),
        ]
    return Profile(pd.DataFrame(rows, columns=COLUMNS), None, None, pd.DataFrame(), {})


@pytest.fixture
def page(browser, tmp_path):
    path = timeline.save_html(profile(), tmp_path / "timeline.html")
    browser.set_offline(True)
    page = browser.new_page()
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri())
    page.locator(".mkt-key").first.wait_for()
    yield page
    assert page.asked == [path.as_uri()]


def shares(page) -> dict[str, float]:
    told = (text.removesuffix(" %").rsplit(" ", 1) for text in page.locator(".mkt-key").all_text_contents())
    return {name: float(share) for name, share in told}


def colours(page) -> list[list[int]]:
    """What is drawn of each rank, a quarter and two thirds along the view."""
    return page.evaluate(
        """() => { const c = document.querySelector("canvas"), s = c.width / c.clientWidth, d = c.getContext("2d");
        const at = (share, rank) => Array.from(d.getImageData((64 + share * (c.clientWidth - 64)) * s, (30 + 52 * rank) * s, 1, 1).data.slice(0, 3));
        return [at(.25, 0), at(.25, 1), at(.66, 0), at(.66, 1)]; }"""
    )


def test_it_shows_who_waits_and_zooms(page):
    assert shares(page) == pytest.approx({"attention": 56.25, "dispatch": 25, "waiting": 18.75}, abs=0.06)
    page.get_by_role("button", name="step 1", exact=True).click()
    blue, grey = [0x77, 0xAA, 0xDD], [0x8C, 0x8C, 0x8C]
    assert colours(page) == [blue, blue, blue, grey]
    canvas = page.locator("canvas")
    width = canvas.bounding_box()["width"]
    canvas.hover(position={"x": 64 + 0.66 * (width - 64), "y": 80})
    told = page.locator(".mkt-told")
    assert told.text_content() == "rank 1, step 1, layer 1: waiting, 3.000 ms at 11.00 ms, _meet"
    # Around the middle of the step nothing is exchanged.
    canvas.focus()
    page.keyboard.press("+")
    assert shares(page) == pytest.approx({"attention": 62.5, "dispatch": 0, "waiting": 37.5}, abs=0.06)
    page.keyboard.press("Home")
    assert shares(page) == pytest.approx({"attention": 56.25, "dispatch": 25, "waiting": 18.75}, abs=0.06)


def test_one_part_alone(page):
    page.get_by_role("button", name="step 0", exact=True).click()
    key = page.locator(".mkt-key").nth(2)
    key.click()
    assert page.locator(".mkt-key").nth(2).get_attribute("aria-pressed") == "true"
    faded, *_, grey = colours(page)
    assert grey == [0x8C, 0x8C, 0x8C] and faded != [0x77, 0xAA, 0xDD]
    page.locator(".mkt-key").nth(2).click()
    assert colours(page)[0] == [0x77, 0xAA, 0xDD]
