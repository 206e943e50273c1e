"""inspect_routing.ipynb in JupyterLab, used as a person would: run, click a token, an expert, the mask button."""

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

TWO = """
import sys
sys.path.insert(0, {tests!r})
from synthetic_traces import synthetic
from moekit.notebook.explorer import explore
trace, domains = synthetic(tokens=400, layers=(1, 3), experts=8, block=100)
first, second = explore(trace, domains=domains), explore(trace, domains=domains)
"""

PLAYGROUND = """
import moekit
from moekit.notebook.playground import Playground
playground = Playground(moekit.load("demo", 1, "cpu", progress=False), "Once upon a time")
playground.settings["max_new_tokens"].value = 250  # time enough to press stop
playground
"""


TIMELINE = """
import sys
sys.path.insert(0, {tests!r})
from made_up_profile import made_up
from moekit.notebook.timeline import Timeline
Timeline(made_up())
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, reference):
    """JupyterLab on the loopback: its address and token; the notebooks stand in its root."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = load_notebook_node(str(ROOT / "notebooks" / "inspect_routing.ipynb"))
    changed = {
        "checkpoint": str(reference / "checkpoint"),
        "data": str(reference / "data-bin"),
        "tokens_per_sample": 64,
        "world_size": 2,
        "device": "cpu",
        "output_dir": str(folder / "results"),
    }
    nbformat.write(parameterize_notebook(notebook, changed), folder / "inspect_routing.ipynb")
    cells = [TWO.format(tests=str(ROOT / "tests")), "first", "second"]
    two = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=notebook.metadata
    )
    nbformat.write(two, folder / "two.ipynb")
    one = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PLAYGROUND)], metadata=notebook.metadata)
    nbformat.write(one, folder / "playground.ipynb")
    cell = nbformat.v4.new_code_cell(TIMELINE.format(tests=str(ROOT / "tests")))
    nbformat.write(
        nbformat.v4.new_notebook(cells=[cell], metadata=notebook.metadata), folder / "timeline.ipynb"
    )
    settings = folder / "settings" / "@jupyterlab"
    for name, chosen in (
        ("notebook-extension/tracker", '{"windowingMode": "none"}'),  # cells out of sight are drawn, too
        ("apputils-extension/notification", '{"fetchNews": "false", "checkForUpdates": false}'),
    ):
        (settings / name).parent.mkdir(parents=True)
        (settings / f"{name}.jupyterlab-settings").write_text(chosen)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--ServerApp.root_dir={folder}", "--allow-root"]
    with open(folder / "lab.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, folder / "lab.log")
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()  # ends the kernels, too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url, server, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no JupyterLab after {seconds} s: {log.read_text()}")


def run_all(browser, lab, name):
    """Open a notebook and run its cells; returns the page."""
    address, token = lab
    page = browser.new_page()
    page.goto(f"{address}/lab/tree/{name}?token={token}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=180_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=300_000)  # else it asks for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    return page


def test_the_notebook_answers_clicks(browser, lab, tmp_path):
    page = run_all(browser, lab, "inspect_routing.ipynb")
    explorer = page.locator(".moekit-explorer").first
    failed = page.locator(
        ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']", has_text="Error"
    )
    explorer.locator(".mk-word").first.or_(failed.first).first.wait_for(timeout=300_000)
    assert failed.all_inner_texts() == []

    def view(kind):
        return explorer.locator(f'[data-view="{kind}"]')

    before = view("token").inner_html()
    explorer.locator(".mk-word").nth(20).click()
    assert "position 20" in view("token").inner_text()
    assert view("token").inner_html() != before

    before = {kind: view(kind).inner_html() for kind in ("text", "load", "expert")}
    view("token").locator("tr").nth(2).locator(".mk-chip").last.click()  # second choice in the second layer
    for kind, old in before.items():
        assert view(kind).inner_html() != old, kind
    assert "of layer 3" in view("expert").locator(".mk-title").inner_text()

    explorer.locator('[name="mask"]').click()
    view("expert").locator(".mk-change").wait_for(timeout=120_000)
    assert "log-probability of the next token changes by" in view("expert").inner_text()
    assert "without expert" in view("text").inner_text()
    coloured = explorer.locator(".mk-word").evaluate_all(
        "all => all.filter((e) => e.style.background && !e.style.background.endsWith(', 0)')).length"
    )
    assert coloured > 0
    explorer.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "lab.png")


def test_two_explorers_do_not_disturb_each_other(browser, lab):
    page = run_all(browser, lab, "two.ipynb")
    page.locator(".moekit-explorer .mk-word").nth(150).wait_for(timeout=120_000)
    first, second = page.locator(".moekit-explorer").all()
    old = second.inner_html()
    first.locator(".mk-word").nth(30).click()
    first.locator('[data-view="token"] .mk-chip').last.click()
    first.locator('[name="domain"]').select_option("1")
    first.locator('[name="search"]').fill("e3")
    assert "position 30" in first.locator('[data-view="token"]').inner_text()
    assert second.inner_html() == old
    second.locator(".mk-word").nth(40).click()
    assert "position 40" in second.locator('[data-view="token"]').inner_text()
    assert "position 30" in first.locator('[data-view="token"]').inner_text()


def test_the_playground_writes_stops_and_remembers(browser, lab):
    page = run_all(browser, lab, "playground.ipynb")
    area = page.locator(".jp-OutputArea-output", has=page.get_by_role("button", name="Generate")).first
    area.wait_for(timeout=120_000)
    right = area.evaluate("area => area.getBoundingClientRect().right")
    parts = area.locator("input, textarea, select, button, .widget-readout, label")
    cut = parts.evaluate_all(
        "(all, right) => all.filter((e) => e.getBoundingClientRect().right > right || e.scrollWidth > e.clientWidth)"
        ".map((e) => e.outerHTML)",
        right,
    )
    assert cut == [], "the page has no room for these"

    area.get_by_role("button", name="Generate").click()
    area.get_by_text("tokens/s").wait_for(timeout=60_000)
    coloured = area.locator("span[title*='%']")
    coloured.nth(5).wait_for()
    assert (
        len(coloured.nth(5).get_attribute("title").splitlines()) >= 6
    )  # its probability and five alternatives
    area.get_by_role("button", name="Stop").and_(page.locator("[disabled]")).wait_for()
    written = coloured.all_inner_texts()

    area.locator("textarea").fill("def main(")
    area.locator("textarea").blur()
    area.get_by_role("button", name="Generate").click()
    area.get_by_role("button", name="Stop").and_(page.locator(":enabled")).click()
    area.get_by_text("stopped").wait_for()
    area.locator("select").select_option(index=1)  # the latest comes first
    page.wait_for_function(
        "area => area.value === 'Once upon a time'", arg=area.locator("textarea").element_handle()
    )
    end = time.monotonic() + 30  # the text comes in a message of its own, after the prompt's
    while coloured.all_inner_texts() != written and time.monotonic() < end:
        time.sleep(0.2)
    assert coloured.all_inner_texts() == written


def test_the_timeline_of_a_profile_zooms(browser, lab):
    page = run_all(browser, lab, "timeline.ipynb")
    keys = page.locator(".moekit-timeline .mkt-key")
    keys.first.wait_for(timeout=60_000)
    assert [text.split(" ")[0] for text in keys.all_text_contents()] == ["dispatch", "experts", "waiting"]
    whole = keys.all_text_contents()
    page.locator(".moekit-timeline").get_by_role("button", name="step 1", exact=True).click()
    page.locator(".moekit-timeline canvas").focus()
    page.keyboard.press("+")
    assert keys.all_text_contents() != whole
    page.keyboard.press("Home")
    assert keys.all_text_contents() == whole
    page.close()
