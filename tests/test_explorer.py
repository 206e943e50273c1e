import dataclasses
import json
import re
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
from synthetic_traces import synthetic

import moekit
from moekit.data.codec import Ids
from moekit.notebook.explorer import explore, save_html
from moekit.notebook.explorer.pack import NONE, UNDISPATCHED, UNIT, choose_samples, pack
from moekit.symbols import PAD

EXPLORER = Path(moekit.__file__).parent / "notebook" / "explorer"


def arrays_of(header, arrays):
    return {name: array for (name, _), array in zip(header["arrays"], arrays, strict=True)}


def test_what_is_packed_is_the_trace():
    trace, domains = synthetic(tokens=300, layers=(1, 3, 5), experts=512, vocab=400)
    header, arrays = pack(trace, None, domains, mask=None, cut=None)
    a = arrays_of(json.loads(json.dumps(header)), arrays)
    assert header["T"] == 300 and header["E"] == 512 and header["K"] == 2 and header["layers"] == [1, 3, 5]

    choice = a["choice"].reshape(3, 300, 2).swapaxes(0, 1)
    assert np.array_equal(choice % UNDISPATCHED, trace.experts)
    assert np.array_equal(choice & UNDISPATCHED == 0, trace.kept)
    for name, wanted in (("prob", trace.probs), ("weight", trace.weights)):
        assert np.abs(a[name].reshape(3, 300, 2).swapaxes(0, 1) / UNIT - wanted).max() < 1e-5
    entropy = a["entropy"].reshape(3, 300).T / UNIT * np.log(512)
    assert np.abs(entropy - trace.entropy).max() < 1e-4

    pieces = np.array(header["pieces"])
    assert [f" {t}" for t in trace.token] == pieces[a["token"]].tolist()
    last = trace.target == 1
    assert last.any() and (a["target"][last] == NONE).all()
    assert [f" {t}" for t in trace.target[~last]] == pieces[a["target"][~last]].tolist()
    assert np.array_equal(np.array(header["domains"])[a["domain"]], domains)


def test_unknown_predictions_are_none():
    trace, _ = synthetic(tokens=50)
    trace = dataclasses.replace(trace, predicted=np.full(50, -1, np.int32))
    assert (arrays_of(*pack(trace, mask=None, cut=None))["predicted"] == NONE).all()


@pytest.mark.parametrize(("labels", "kind"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_any_number_of_labels_has_numbers_of_its_own(labels, kind):
    trace, _ = synthetic(tokens=labels, layers=(1,), experts=4)
    names = np.array([f"{n:06d}" for n in range(labels)])
    header, arrays = pack(trace, None, names, mask=None, cut=None)
    packed = arrays_of(header, arrays)["domain"]
    assert (packed == np.arange(labels)).all() and packed.dtype == kind


def test_bad_domains_are_refused():
    trace, domains = synthetic(tokens=50)
    with pytest.raises(ValueError, match=r"\[49\]; expected a label for each of 50 tokens"):
        explore(trace, domains=domains[:-1])
    with pytest.raises(ValueError, match="no tokens"):
        explore(trace.select(samples=999))
    for asked, said in (
        ({"trace": None}, "trace=None: expected a trace"),
        ({"trace": trace, "model": "demo"}, "model='demo': expected a model that moekit.load gave"),
        # In the place of the codec.
        ({"trace": trace, "model": Ids("")}, "^model=.*: expected a model that moekit.load gave"),
        ({"trace": trace, "codec": "demo"}, "codec='demo': expected a model's codec or None"),
    ):
        with pytest.raises(ValueError, match=said):
            explore(**asked)
    with pytest.raises(ValueError, match="trace='demo': expected a trace"):
        save_html("demo", "page.html")


def test_a_full_size_trace_stays_small():
    tokens, layers, experts = 250_000, 6, 512  # not synthetic(): its drawing takes a minute
    rng = np.random.default_rng(0)
    small, _ = synthetic(tokens=tokens, layers=(1,), experts=2, block=2000)
    shape = (tokens, layers, 2)
    trace = dataclasses.replace(
        small,
        layers=tuple(range(layers)),
        experts=rng.integers(0, experts, shape, dtype=np.int16),
        probs=np.full(shape, 0.25, np.float32),
        weights=np.full(shape, 0.5, np.float32),
        kept=np.ones(shape, bool),
        entropy=np.ones((tokens, layers), np.float32),
        num_experts=experts,
    )
    _, arrays = pack(trace, mask=None, cut=None)
    assert sum(array.nbytes for array in arrays) < 30e6


def test_a_cut_is_spread_over_domains_and_trace():
    sample = np.repeat(np.arange(100), 10)
    domains = np.where(sample < 90, "common", "rare")
    chosen = choose_samples(sample, domains, 100)
    assert len(chosen) == 10
    assert (chosen >= 90).sum() == 5
    common = chosen[chosen < 90]
    assert common.min() < 30 and common.max() > 60
    assert choose_samples(sample, domains, 1000).tolist() == list(range(100))
    assert choose_samples(sample, domains, 3).size == 1  # never none


def test_the_page_says_what_was_cut(tmp_path):
    trace, domains = synthetic(tokens=1000, block=100)
    text = save_html(trace, tmp_path / "new" / "page.html", domains=domains, max_tokens=450).read_text(
        "utf-8"
    )
    header = json.loads(re.search(r'id="header">(.*?)</script>', text).group(1))
    assert header["T"] == 400
    assert header["cut"].startswith("This page holds 400 of the trace's 1,000 tokens: 4 of 10 samples")
    assert header["mask"].startswith("masking needs the model")
    whole = save_html(trace, tmp_path / "page.html", domains=domains).read_text("utf-8")
    assert json.loads(re.search(r'id="header">(.*?)</script>', whole).group(1))["cut"] is None
    assert not re.search(r"""(src|href)=|@import|url\(|https?://(?!www\.w3\.org)""", text)
    with pytest.raises(ValueError, match="max_tokens=0"):
        save_html(trace, tmp_path / "page.html", max_tokens=0)


def test_no_token_ends_the_script_it_stands_in(tmp_path):
    trace, _ = synthetic(tokens=100)
    codec = types.SimpleNamespace(pieces=lambda ids: ["</script><script>alert(1)</script><!--"] * len(ids))
    text = save_html(trace, tmp_path / "page.html", codec).read_text("utf-8")
    assert "alert(1)</script>" not in text and "<!--" not in text


def test_a_saved_notebook_does_not_hold_the_trace():
    trace, domains = synthetic(tokens=5000)
    state = explore(trace, domains=domains).get_state()
    state.pop("_esm"), state.pop("_css")
    assert len(json.dumps(state, default=repr)) < 2000


@pytest.fixture
def sent(monkeypatch):
    """What an explorer sends."""
    messages = []
    monkeypatch.setattr(
        "moekit.notebook.explorer.Explorer.send",
        lambda self, content, buffers=(): messages.append((content, buffers)),
    )
    return messages


def test_messages_are_answered_by_id(sent):
    trace, _ = synthetic(tokens=100)
    explorer = explore(trace)
    explorer._answer(explorer, {"ask": "trace", "id": "7"}, [])
    explorer._answer(explorer, {"ask": "mask", "id": "8", "layer": 0, "expert": 1, "from": 0, "to": 100}, [])
    assert sent[0][0]["id"] == "7" and len(sent[0][1]) == len(sent[0][0]["header"]["arrays"])
    assert sent[1][0] == {
        "id": "8",
        "error": "ValueError: masking needs the model: explore(trace, model=model)",
    }


def test_masking_scores_the_sample_with_and_without_the_expert(reference, sent):
    with moekit.load(reference / "checkpoint", world_size=2, device="cpu", progress=False) as model:
        trace = model.trace(reference / "data-bin", tokens_per_sample=64, progress=False)
        explorer = explore(trace, model=model)
        rows = np.flatnonzero(trace.sample == 1)
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        expert = int(trace.experts[rows, 1, 0][0])
        delta, said = explorer.mask(rows, 1, expert)
        assert "capacity: none" in said
        with model.route(mask={trace.layers[1]: [expert]}):
            masked = model.trace(reference / "data-bin", tokens_per_sample=64, progress=False)
        wanted = (masked.logprob - trace.logprob)[rows]
        assert np.nanmax(np.abs(wanted)) > 1e-4  # it does matter here
        np.testing.assert_allclose(delta, wanted, atol=2e-5)

        # Before the first token that chose it nothing can change.
        untouched = (trace.experts[rows, 1] != expert).all(axis=1)
        assert not np.any(delta[: untouched.argmin()])

        part = explore(trace.select(mask=trace.position > 0), model=model)
        with pytest.raises(ValueError, match="only a part of sample"):
            part.mask(slice(0, 10), 0, 0)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_look_ups_in_the_page_are_those_of_the_trace(tmp_path):
    """explorer.js on the arrays that pack made, run by node, with the constants of the header."""
    trace, domains = synthetic(tokens=300, layers=(1, 3, 5), experts=512, block=128)
    header, arrays = pack(trace, None, domains, mask=None, cut=None)
    (tmp_path / "header.json").write_text(json.dumps(header))
    for number, array in enumerate(arrays):
        (tmp_path / f"{number}.bin").write_bytes(array.tobytes())
    (tmp_path / "explorer.mjs").write_text((EXPLORER / "explorer.js").read_text("utf-8"), "utf-8")
    (tmp_path / "run.mjs").write_text(
        """
import { readFileSync } from "node:fs";
import { Data } from "./explorer.mjs";
const header = JSON.parse(readFileSync("header.json", "utf8"));
const data = new Data(header, header.arrays.map((_, i) => readFileSync(`${i}.bin`)));
const all = data.allowed({ domain: -1, undispatched: false, layer: -1 });
const lost = data.allowed({ domain: -1, undispatched: true, layer: 1 });
const rows = Array.from({ length: data.T }, (_, i) => data.picks(1, i));
const unknown = Array.from(data.target, (piece) => piece === data.NONE);
console.log(JSON.stringify({
  load: data.load(all).map((n) => Array.from(n)), lost: Array.from(lost.mask), rows, unknown,
  entropy: Array.from({ length: data.T }, (_, i) => data.entropyOf(1, i)),
  undispatched: data.expert(1, rows[0][0].expert, all).undispatched,
}));
"""
    )
    ran = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    for place, load in enumerate(found["load"]):
        assert load == np.bincount(trace.experts[:, place].ravel(), minlength=512).tolist()
    assert np.array_equal(np.array(found["lost"], bool), ~trace.kept[:, 1].all(axis=1))
    for name, wanted, atol in (
        ("expert", trace.experts, 0),
        ("kept", trace.kept, 0),
        ("prob", trace.probs, 1e-5),
    ):
        got = np.array([[pick[name] for pick in row] for row in found["rows"]], float)
        np.testing.assert_allclose(got, wanted[:, 1], rtol=0, atol=atol)
    np.testing.assert_allclose(found["entropy"], trace.entropy[:, 1], atol=1e-4)
    assert found["unknown"] == (trace.target == PAD).tolist()
    here = trace.experts[:, 1] == trace.experts[0, 1, 0]
    assert found["undispatched"] == (here & ~trace.kept[:, 1]).sum()
