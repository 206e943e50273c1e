"""A real Chromium without a display, and nothing beyond this machine."""

import shutil

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser with a profile of its own; an error that a page throws fails the module."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    errors = []
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=chromium,
            headless=True,
            args=ARGUMENTS,
            viewport={"width": 1180, "height": 1000},
            accept_downloads=True,
        )
        context.set_default_timeout(30_000)
        context.on("weberror", lambda error: errors.append(str(error.error)))
        yield context
        context.close()
    assert not errors


@pytest.fixture
def offline(browser):
    """Opens a page of a file with the network off; ``asked`` of the page are the addresses that it asks for."""

    def opened(path, first: str):
        """``first`` selects what is there once the page is drawn."""
        browser.set_offline(True)
        page = browser.new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri())
        page.locator(first).first.wait_for()
        return page

    return opened
