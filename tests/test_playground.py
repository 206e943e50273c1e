"""The playground's widgets, clicked by hand, and the table that needs none."""

import json
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import moekit
from moekit.data.codec import Codec, Ids
from moekit.generation.request import Generation, Token
from moekit.notebook import report
from moekit.notebook.playground import Playground, Shown, arguments, coloured, static, written
from moekit.paths import DEMO_BPE as DEMO


@pytest.fixture(scope="module")
def codec():
    return Codec.load(DEMO)


class Model:
    """Streams fixed text, a token at a time; ``allowed`` releases one each."""

    def __init__(self, codec, text):
        self.codec, self.config = codec, SimpleNamespace(max_positions=64)
        self.ids, self.asked, self.closed = codec.encode(text), [], False
        self.allowed = threading.Semaphore(1000)

    def stream(self, prompt, **settings):
        self.asked.append((prompt, settings))
        if prompt == "wrong":
            raise ValueError("prompt 0 is wrong\nand more")
        try:
            for number in self.ids:
                assert self.allowed.acquire(timeout=10)
                text = self.codec.decode([number])
                yield Token(0, number, text, np.log(0.25), [(number, np.log(0.25)), (2, np.log(0.5))], None)
        finally:
            self.closed = True


def click(playground):
    playground.go.click()
    playground.thread.join(timeout=10)
    assert not playground.thread.is_alive()


def plain(html):
    return re.sub(r"<[^>]*>", "", html.replace("<br>", "\n"))


def test_a_click_streams_the_text_and_keeps_it(codec):
    model = Model(codec, "a < b\nc")
    playground = Playground(model, "<p>")
    playground.settings["top_k"].value = 40
    click(playground)
    assert plain(playground.text.value) == "&lt;p&gt;a &lt; b¶\nc"
    assert "tokens/s" in playground.status.value
    prompt, settings = model.asked[0]
    assert prompt == "<p>" and (settings["top_k"], settings["temperature"]) == (40, 0.8)
    assert (playground.go.disabled, playground.halt.disabled) == (False, True)

    playground.prompt.value = "other"
    playground.settings["temperature"].value = 0.0
    click(playground)
    assert model.asked[1][1]["temperature"] == 0.0
    assert [run.prompt for run in playground.runs] == ["<p>", "other"]
    playground.history.value = 0
    assert playground.prompt.value == "<p>" and playground.settings["temperature"].value == 0.8

    click(playground)
    playground.prompt.value = "edited"
    playground.history.value = 2  # the run that has just ended
    assert playground.prompt.value == "<p>"


def test_the_stop_button_ends_it(codec):
    model = Model(codec, "one two three four five")
    model.allowed = threading.Semaphore(2)
    playground = Playground(model)
    playground.go.click()
    first = playground.thread
    playground.go.click()  # while it runs this does nothing
    assert playground.thread is first and not playground.halt.disabled
    playground.halt.click()
    model.allowed.release()
    first.join(timeout=10)
    assert model.closed and "stopped" in playground.status.value
    assert len(model.asked) == 1 and len(playground.runs[0].tokens) < len(model.ids)


def test_what_goes_wrong_is_said(codec):
    playground = Playground(Model(codec, "x"), "wrong")
    click(playground)
    assert playground.status.value == "prompt 0 is wrong"
    assert not playground.go.disabled


def test_top_p_of_one_and_a_line_end():
    values = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    found = arguments(values | {"seed": 1, "line_end": True})
    assert (found["top_k"], found["top_p"], found["stop"]) == (None, None, ["\n"])


def test_less_probable_is_darker_and_the_mouse_tells_more():
    html = coloured([Shown("sure", 1.0), Shown('"<', 0.1, [("x", 0.5), ("\n", 0.25)]), Shown("!", 0.0)])
    shades = [float(shade) for shade in re.findall(r"0, ([\d.]+)\)", html)]
    assert shades == [0.0, 0.23, 0.7]
    assert 'title="10.0%&#10; 50.0%  &#x27;x&#x27;&#10; 25.0%  &#x27;\\n&#x27;"' in html
    assert plain(html) == "sure&quot;&lt;!"


def test_parts_of_a_character_show_with_the_whole():
    html = coloured([Shown("", 0.5), Shown("日", 0.25)])
    assert plain(html) == "日" and 'title="50.0%&#10;25.0%"' in html


def test_the_table_shows_every_generation(codec):
    ids = codec.encode("日 & <b>")
    logprobs = np.full(len(ids), -1.0, np.float32)
    best = [[(ids[0], -1.0), (2, -2.0)]] * len(ids)
    generations = [
        Generation(0, "日 & <b>", ids, logprobs, "length", -4.5, best),
        Generation(1, "日", ids[:-1], logprobs[:-1], "stop", -1.0),
    ]
    table = static(generations, ["Once\nmore", codec.encode("x")], codec)
    html = table._repr_html_()
    assert html.count("<tr>") == 3 and "Once\nmore" in html and "日 &amp; &lt;b&gt;" in plain(html)
    assert "13.5%" in html and "-4.50" in html
    assert "'Once\\nmore'\n -> '日 & <b>' (length, -4.50)" in repr(table)


def test_a_generation_and_a_codec_take_one_readable_line(codec):
    """Without arrays, without addresses, and cut short."""
    one = Generation(3, "Once\nmore " * 100, [5, 6], np.array([-1.0, -2.5], np.float32), "length", -3.5)
    said = repr(one)
    assert said.startswith("<generation of prompt 3: 'Once\\nmore ") and "..." in said
    assert said.endswith("(2 tokens, length, score -3.50)>") and len(said) < 160 and said.isprintable()
    assert repr(replace(one, text=None)) == "<generation of prompt 3: (2 tokens, length, score -3.50)>"
    assert repr(codec) == f"<codec of {DEMO}: {len(codec):,} types>"
    assert repr(Ids("there is no dict.txt")) == "<no codec, tokens are ids: there is no dict.txt>"


def test_what_was_written_is_kept(tmp_path):
    """A line for each text; where nothing was written, a file without lines takes the place of an earlier one."""
    logprobs = np.array([-1 / 3, -2.5], np.float32)
    texts = [
        Generation(1, '日\n"<b>', [7, 2], logprobs, "length", -2.8),
        Generation(0, "x", [5], logprobs[:1], "stop", -0.3),
    ]
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        evaluation = model.evaluate("demo", max_batches=1, progress=False)
        for kept in (written(texts, ["one", "two\nlines"]), written([], [])):
            report.save(tmp_path, model, evaluation, {}, written=kept)
            lines = (tmp_path / "generations.jsonl").read_text("utf-8").splitlines()
            assert len(lines) == len(kept)
            if lines:
                first, second = map(json.loads, lines)
                assert first.pop("logprobs") == pytest.approx(logprobs.tolist(), abs=1e-12)
                assert first == {
                    "prompt": "two\nlines",
                    "text": '日\n"<b>',
                    "ids": [7, 2],
                    "finish_reason": "length",
                    "score": -2.8,
                }
                assert (second["prompt"], second["finish_reason"]) == ("one", "stop")
