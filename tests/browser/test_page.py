"""The stand-alone page, with the network off."""

import base64
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from synthetic_traces import synthetic

import moekit.notebook.explorer
from moekit.notebook.explorer import save_html
from moekit.notebook.explorer.pack import pack

pytestmark = pytest.mark.slow
SCRIPT = Path(moekit.notebook.explorer.__file__).with_name("explorer.js")

LOOK_UP = """async ([source, header, arrays, question]) => {
    const { Data } = await import("data:text/javascript;base64," + source);
    const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const data = new Data(header, arrays.map(bytes));
    const plain = (x) => ArrayBuffer.isView(x) ? Array.from(x)
        : Array.isArray(x) ? x.map(plain)
        : x && typeof x === "object" ? Object.fromEntries(Object.entries(x).map(([k, v]) => [k, plain(v)])) : x;
    return plain(new Function("data", "return " + question)(data));
}"""


@pytest.fixture(scope="module")
def made():
    return synthetic(tokens=1600, layers=(1, 3, 5), experts=64, block=200, domains=3, vocab=150)


@pytest.fixture
def ask(browser, made):
    """Evaluates an expression over ``data``, explorer.js's Data of the trace."""
    trace, domains = made
    header, arrays = pack(trace, None, domains, mask=None, cut=None)
    page = browser.new_page()
    texts = [base64.b64encode(array.tobytes()).decode() for array in arrays]
    source = base64.b64encode(SCRIPT.read_bytes()).decode()
    return lambda question: page.evaluate(LOOK_UP, [source, header, texts, question])


@pytest.fixture
def page(offline, made, tmp_path):
    trace, domains = made
    return offline(save_html(trace, tmp_path / "explorer.html", domains=domains), ".mk-word")


def view(page, kind):
    return page.locator(f'[data-view="{kind}"]')


def test_look_ups_equal_brute_force(ask, made):
    trace, domains = made
    everything = "{domain: -1, undispatched: false, layer: -1}"
    for place, expert in ((0, 5), (2, int(trace.experts[7, 2, 1]))):
        found = ask(f"data.expert({place}, {expert}, data.allowed({everything}), 5)")
        here = trace.experts[:, place] == expert  # [T, K]
        rows = here.any(axis=1)
        assert found["n"] == here.sum() and found["first"] == here[:, 0].sum()
        assert found["undispatched"] == (~trace.kept[:, place][here]).sum()
        assert found["prob"] == pytest.approx(trace.probs[:, place][here].mean(), abs=1e-4)
        assert found["byDomain"] == [(rows & (domains == d)).sum() for d in np.unique(domains)]
        best = np.sort(trace.probs[:, place][here])[::-1][:5]
        assert [c["prob"] for c in found["contexts"]] == pytest.approx(best, abs=1e-4)
        partner = np.bincount(trace.experts[rows, place].ravel(), minlength=64)
        partner[expert] = 0
        assert [p["count"] for p in found["partners"]] == np.sort(partner[partner > 0])[::-1][:5].tolist()
        if place:
            before = np.bincount(trace.experts[rows, place - 1, 0])
            assert [b["count"] for b in found["before"]] == np.sort(before[before > 0])[::-1][:5].tolist()
        ids = np.unique(trace.token)
        lift = [
            (here.any(axis=1) & (trace.token == t)).sum() / here.sum() / (trace.token == t).mean()
            for t in ids
        ]
        header_ids = np.unique(
            np.concatenate([trace.token, trace.target[trace.target != 1], trace.predicted])
        )
        for top in found["tokens"]:
            token = header_ids[top["piece"]]
            assert top["count"] == (rows & (trace.token == token)).sum()
            assert top["lift"] == pytest.approx(lift[int(np.searchsorted(ids, token))])


def test_filters_equal_brute_force(ask, made):
    trace, domains = made
    lost = (~trace.kept).any(axis=2)  # [T, L]
    for question, wanted in (
        ("{domain: 1, undispatched: false, layer: -1}", domains == "domain 1"),
        ("{domain: -1, undispatched: true, layer: 1}", lost[:, 1]),
        ("{domain: 2, undispatched: true, layer: -1}", lost.any(axis=1) & (domains == "domain 2")),
    ):
        found = ask(f"data.allowed({question})")
        assert found["mask"] == wanted.astype(int).tolist() and found["count"] == wanted.sum()
        load = ask(f"data.load(data.allowed({question}))")
        for place in range(3):
            assert load[place] == np.bincount(trace.experts[wanted, place].ravel(), minlength=64).tolist()


def test_search_equals_brute_force(ask, made):
    trace, _ = made
    found = ask('data.search("11", 0)')
    hit = np.array(["11" in str(t) for t in trace.token])
    assert found["total"] == hit.sum() > 0
    assert found["rows"] == np.flatnonzero(hit)[:40].tolist()
    assert found["experts"] == [{"layer": n, "expert": 11} for n in range(3)]
    assert ask('data.search("3:11", 0)')["experts"] == [{"layer": 1, "expert": 11}]
    assert ask('data.search("layer 5 expert 63", 0)')["experts"] == [{"layer": 2, "expert": 63}]
    assert ask('data.search("e64", 0)')["experts"] == []  # there is none


def test_a_token_shows_its_experts(page, made):
    trace, _ = made
    page.locator('.mk-word[data-row="37"]').click()
    chips = view(page, "token").locator(".mk-chip")
    assert chips.all_inner_texts() == [f"E{e}" for e in trace.experts[37].ravel()]
    assert "position 37" in view(page, "token").inner_text()
    assert page.locator(".mk-word.mk-here").get_attribute("data-row") == "37"
    # One choice or both of the first layer, which is shown, are not dispatched.
    row = int(np.argmin(trace.kept[:200, 0].all(axis=1)))
    word = page.locator(f'.mk-word[data-row="{row}"]')
    word.click()
    assert " not dispatched" in word.get_attribute("title")
    lost = view(page, "token").locator(".mk-undispatched").all()
    assert len(lost) == (~trace.kept[row]).sum() > 0
    for cell in lost:
        assert cell.inner_text().endswith(" → none")
        assert cell.get_attribute("title").endswith(", not dispatched")


def test_three_choices_of_a_token_are_shown(offline, tmp_path):
    trace, _ = synthetic(tokens=60, layers=(1,), experts=16, block=60, choices=3)
    trace.kept[:] = True
    trace.kept[5, 0, 2] = trace.kept[6] = False
    page = offline(save_html(trace, tmp_path / "explorer.html"), ".mk-word")
    page.locator('[name="colour"]').select_option("undispatched")
    keys = page.locator(".mk-legend .mk-key")
    assert keys.all_inner_texts() == ["some choices not dispatched", "none dispatched"]
    some, none = (key.evaluate("key => key.style.background") for key in keys.all())
    words = page.locator(".mk-word").all()
    shown = [word.evaluate("word => word.style.background") for word in words]
    assert shown[4:8] == ["", some, none, ""]
    third = int(trace.experts[5, 0, 2])
    words[5].click()
    head = view(page, "token").locator("tr").first.locator("th")
    assert head.all_inner_texts() == [
        "layer",
        *(f"{name}: prob → weight" for name in ("first", "second", "choice 3")),
        "entropy",
    ]
    view(page, "token").locator(".mk-chip", has_text=f"E{third}").last.click()
    assert "mk-same" in words[5].get_attribute("class")


def test_an_expert_changes_every_linked_view(page, made):
    trace, _ = made
    page.locator('.mk-word[data-row="37"]').click()
    before = {kind: view(page, kind).inner_html() for kind in ("text", "load", "expert")}
    expert = int(trace.experts[37, 1, 1])
    view(page, "token").locator(f'.mk-chip[data-layer="1"][data-expert="{expert}"]').click()
    assert f"Expert {expert} of layer 3" in view(page, "expert").inner_text()
    for kind, old in before.items():
        assert view(page, kind).inner_html() != old, kind
    chosen = (trace.experts[:200, 1] == expert).any(axis=1)
    marked = page.locator(".mk-word.mk-same").evaluate_all("all => all.map((e) => +e.dataset.row)")
    assert marked == np.flatnonzero(chosen).tolist()

    # A context leads back to its token.
    context = view(page, "expert").locator(".mk-context").first
    row = context.get_attribute("data-row")
    context.click()
    assert page.locator(".mk-word.mk-here").get_attribute("data-row") == row


def test_search_and_filters(page, made):
    trace, domains = made
    assert not view(page, "results").is_visible()
    page.locator('[name="search"]').fill("5:17")
    view(page, "results").locator(".mk-chip").first.click()
    assert "Expert 17 of layer 5" in view(page, "expert").inner_text()
    page.locator('[name="search"]').fill("")
    page.locator('[name="domain"]').select_option("2")
    assert f"{(domains == 'domain 2').sum()} of 1,600 tokens" in page.locator(".mk-bar").inner_text()
    faded = page.locator(".mk-word.mk-faded").count()
    assert 0 < faded < 200
    page.locator('[name="undispatched"]').select_option("layer")
    lost = (~trace.kept[:, 2]).any(axis=1) & (domains == "domain 2")
    assert f"{lost.sum()} of 1,600 tokens" in page.locator(".mk-bar").inner_text()


def test_masking_is_off_and_says_why(page):
    assert page.locator('[name="mask"]').is_disabled()
    assert "masking needs the model" in view(page, "expert").inner_text()


@pytest.mark.parametrize("kind", ["text", "token", "load", "expert"])
def test_every_view_saves_as_svg_and_png(page, kind, tmp_path):
    for name in ("SVG", "PNG"):
        with page.expect_download() as waiting:
            view(page, kind).get_by_role("button", name=name, exact=True).click()
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
        if name == "PNG":
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000
            continue
        words = [e.text for e in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]
        shown = view(page, kind).locator(".mk-title").inner_text().split()
        assert words[: len(shown)] == shown and "SVG" not in words


def test_nothing_is_fetched(page):
    page.locator(".mk-word").nth(5).click()
    assert all(url.startswith(("file:", "blob:", "data:")) for url in page.asked)


def test_a_hostile_token_is_only_text(offline, made, tmp_path):
    class Hostile:
        def pieces(self, ids):
            return ["</script><img src=x onerror='document.title=1'>"] * len(ids)

    trace, _ = made
    page = offline(save_html(trace, tmp_path / "explorer.html", Hostile()), ".mk-word")
    assert page.locator(".mk-word").first.inner_text().startswith("</script><img")
    assert page.locator("img").count() == 0 and page.title() == "moekit: routing"
