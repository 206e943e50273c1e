import tempfile
from types import SimpleNamespace

import pytest

from moekit.arguments import ParameterError
from moekit.notebook import preflight

GOOD = {
    "checkpoint": "demo",
    "data": "demo",
    "subset": "valid",
    "world_size": 2,
    "device": "cpu",
    "tokens_per_sample": None,
    "context_window": 0,
    "max_new_tokens": 40,
    "temperature": 0.7,
    "top_k": None,
    "top_p": 0.9,
    "beam_size": 1,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "seed": 1,
    "output_dir": tempfile.gettempdir(),
}


def given(**changes) -> SimpleNamespace:
    return SimpleNamespace(**GOOD | changes)


def test_what_is_whole_passes():
    assert preflight.run_inference(given()).experts == 16
    assert preflight.run_inference(given(world_size=None)).experts == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": "/nowhere/model.pt"}, "there is no folder /nowhere"),
        ({"checkpoint": "demo/model-rank-99.pt"}, "no folder|no file"),
        ({"device": "cuda", "world_size": 99}, "world_size 99 needs as many GPUs"),
        ({"subset": "bogus"}, r"has no bogus\.bin"),
        ({"data": "/nowhere"}, r"/nowhere has no dict\.txt"),
        ({"tokens_per_sample": 9999}, "tokens_per_sample=9999: the model has 256 positions"),
        ({"context_window": 256}, "context_window=256: expected less than a block's 256 tokens"),
        ({"max_new_tokens": 256}, "max_new_tokens=256: the model has 256 positions"),
        ({"temperature": 0.0, "num_return_sequences": 3}, "num_return_sequences=3: at temperature 0"),
        ({"beam_size": 2, "num_return_sequences": 3}, "expected at most beam_size=2"),
        ({"output_dir": "/proc/nowhere"}, "output_dir='/proc/nowhere': nothing can be written to"),
        ({"output_dir": __file__}, "test_preflight.py.*name another folder"),
    ],
)
def test_what_would_fail_later_is_said_at_once(changes, said):
    with pytest.raises(ParameterError, match=said):
        preflight.run_inference(given(**changes))


@pytest.mark.parametrize("texts", [[], ["some text", ""]])
def test_empty_texts_are_said_at_once(texts):
    rest = {"layers": None, "compare_with": None}
    assert preflight.inspect_routing(given(texts=["some text"], **rest)).experts == 16
    with pytest.raises(ParameterError, match="expected at least one text, and none of them empty"):
        preflight.inspect_routing(given(texts=texts, **rest))


def test_settings_of_the_generation_fit_each_other():
    draws = preflight.generation(given())
    assert (draws["temperature"], draws["top_p"], draws["alternatives"]) == (0.7, 0.9, 5)
    assert "top_p" not in preflight.generation(given(temperature=0.0))
    assert {"temperature", "top_p", "alternatives"}.isdisjoint(preflight.generation(given(beam_size=4)))
