"""The timeline as a page, with the network off."""

import pytest
from made_up_profile import made_up

from moekit.notebook import timeline

pytestmark = pytest.mark.slow
# The experts and waiting.
YELLOW, GREY = [0xEE, 0xDD, 0x88], [0x8C, 0x8C, 0x8C]


@pytest.fixture
def page(offline, tmp_path):
    path = timeline.save_html(made_up(), tmp_path / "timeline.html")
    page = offline(path, ".mkt-key")
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
    assert shares(page) == pytest.approx({"experts up": 56.25, "dispatch": 25, "waiting": 18.75}, abs=0.06)
    page.get_by_role("button", name="step 1", exact=True).click()
    assert colours(page) == [YELLOW, YELLOW, YELLOW, GREY]
    canvas = page.locator("canvas")
    width = canvas.bounding_box()["width"]
    canvas.hover(position={"x": 64 + 0.66 * (width - 64), "y": 80})
    told = page.locator(".mkt-told")
    assert told.text_content() == "rank 1, step 1, layer 1: waiting, 3.000 ms at 11.00 ms, _meet"
    # Around the middle of the step nothing is exchanged.
    canvas.focus()
    page.keyboard.press("+")
    assert shares(page) == pytest.approx({"experts up": 62.5, "dispatch": 0, "waiting": 37.5}, abs=0.06)
    page.keyboard.press("Home")
    assert shares(page) == pytest.approx({"experts up": 56.25, "dispatch": 25, "waiting": 18.75}, abs=0.06)


def test_one_part_alone(page):
    page.get_by_role("button", name="step 0", exact=True).click()
    key = page.locator(".mkt-key").nth(2)
    key.click()
    assert page.locator(".mkt-key").nth(2).get_attribute("aria-pressed") == "true"
    faded, *_, grey = colours(page)
    assert grey == GREY and faded != YELLOW
    page.locator(".mkt-key").nth(2).click()
    assert colours(page)[0] == YELLOW
