"""Whatever a public function of the metrics, the reports and the plan is given, it is taken or named in one sentence."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_traces import synthetic

import moekit
from moekit.arguments import Flag, Whole
from moekit.checked import Instance, Named, checked
from moekit.notebook import report
from moekit.routing import compare, exchange, metrics, pairs
from moekit.routing import trace as tracing
from moekit.routing.domains import domains_of

TRACE, LABELS = synthetic(tokens=120, block=20, experts=6)
EMPTY = TRACE.select(mask=np.zeros(len(TRACE), bool))
WRONG = {
    "None": None,
    "a text": "yes",
    "half a character": "\ud800",
    "two": 2,
    "less than none": -1,
    "no number": math.nan,
    "endless": math.inf,
    "an array": np.zeros((2, 3)),
    "a list": ["a"],
    "a dict": {"a": 1},
    "a set": {1},
    "an object": object(),
    "an empty trace": EMPTY,
}
# Values of the arguments that have to be given, by their names.
GIVEN = {
    **dict.fromkeys(("trace", "before", "after", "one", "other", "self"), TRACE),
    **dict.fromkeys(("groups", "labels", "domain"), LABELS),
    "metric": "load",
    "layer": 1,
    "expert": 0,
    "ranks": 2,
    "pieces": ["a"] * len(TRACE),
    "of": str,
    "traces": [TRACE.select(samples=0), TRACE.select(samples=1)],
    "layout": "vllm",
    "successes": np.ones(2),
    "trials": np.full(2, 4),
    "tokens": 40,
    "experts": 6,
    "k": 2,
    "room": 3,
    "parameters": {},
    "figures": {},
    "tables": {},
    "codec": None,
    "dtype": "float32",
    "device": "cpu",
    "world_size": 1,
    "checkpoint": "demo",
    "data": "demo",
    "subset": "valid",
}


def labelled(domain):
    return TRACE.labelled(domain=domain)


PUBLIC = {f"metrics.{name}": getattr(metrics, name) for name in metrics.__all__ if name[0].islower()}
del PUBLIC["metrics.measured"]
PUBLIC |= {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module, names in {
        compare: ("compare", "change_by_domain", "weight_change"),
        tracing: ("join",),
        pairs: ("align",),
        exchange: ("read", "write"),
        report: report.__all__,
    }.items()
    for name in names
}
PUBLIC |= {"Trace." + f.__name__: f for f in (TRACE.at, TRACE.labels_of, TRACE.select, TRACE.save)}
PUBLIC |= {"Trace.load": tracing.Trace.load, "Trace.labelled": labelled, "plan": moekit.plan}
PUBLIC["domains_of"] = domains_of
del PUBLIC["report.machine"], PUBLIC["report.versions"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    exchange.write(TRACE, folder / "trace.npz", "vllm")
    TRACE.save(folder / "trace.parquet")
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        evaluation = model.evaluate("demo", max_batches=1, progress=False)
        yield GIVEN | {
            "path": folder / "trace.npz",
            "saved": folder / "trace.parquet",
            "folder": folder,
            "output_dir": folder / "out",
            "model": model,
            "evaluation": evaluation,
        }


@pytest.mark.parametrize("name", PUBLIC)
def test_what_makes_no_sense_is_named(name, given, monkeypatch, tmp_path):
    """Never an error of Python's own: a ValueError, or a result. A flag is true or false, and no word and no number."""
    monkeypatch.chdir(tmp_path)
    function = PUBLIC[name]
    parameters = dict(inspect.signature(function).parameters)
    needed = {key: given[key] for key, one in parameters.items() if one.default is one.empty and key in given}
    if name == "Trace.load":
        needed["path"] = given["saved"]
    if name == "Trace.save":
        needed["path"] = tmp_path / "trace.parquet"
    if name in ("report.quantisation", "domains_of"):
        # These need experts in one byte, and a trace of binarised data.
        with pytest.raises(
            ValueError, match="load it with experts|not of binarised data|known for data in blocks"
        ):
            function(**needed)
    else:
        function(**needed)
    for key, one in parameters.items():
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            continue
        taken = []
        for what, value in WRONG.items():
            try:
                function(**needed | {key: value})
                taken.append(what)
            except ValueError as error:
                said = str(error)
                assert said and said.isprintable(), (key, what, said)
        if isinstance(one.default, bool):
            assert not taken, (key, taken)


@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize("flag", ["yes", 2, None])
def test_prompt_is_a_flag(name, flag):
    with pytest.raises(ValueError, match=r"prompt=.*: expected True or False"):
        metrics.METRICS[name](TRACE, prompt=flag)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: metrics.placement("x", 2),
            "trace='x': expected a trace, such as model.trace or Trace.load gives",
        ),
        (lambda: metrics.load(TRACE, dispatched=2), "dispatched=2: expected True or False"),
        (lambda: metrics.load(TRACE, choice=2), "choice=2: expected at most 1"),
        (
            lambda: metrics.permutation(TRACE, LABELS, draws=18),
            "draws=18: expected a whole number of at least 19",
        ),
        (lambda: metrics.drops(TRACE, "day"), "by='day': expected one of layer, choice, position, expert"),
        (lambda: report.quantisation("demo"), "model='demo': expected a model that moekit.load gave"),
        (lambda: report.model(None), "model=None: expected a model that moekit.load gave"),
        (lambda: report.save_figures("out", {"a": 1}), "figures={'a': 1}: expected figures by name"),
        (lambda: tracing.join([TRACE, "x"]), r"traces\[1\]='x': expected a trace"),
        (lambda: labelled(["a\ud800"] + ["b"] * 119), r"domain=\['a\\ud800'\]: .*half of a surrogate pair"),
        (lambda: TRACE.labelled(kind=3), "kind=3: expected a label for each token"),
        (lambda: metrics.wilson(3, 2), "successes=.*expected from 0 to as many as trials"),
    ],
)
def test_the_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_labels_of_any_type_are_taken():
    mixed = [1, "b", None] * 40
    table = metrics.domain_specialisation(TRACE, mixed)
    assert sorted(table["domain"].unique()) == ["1", "None", "b"]
    assert labelled(mixed).labels["domain"].tolist()[:3] == ["1", "b", "None"]


def test_checked():
    @checked(size=Whole(), of=Instance(Path, "a path"), by=Named(int, "numbers by name"), fast=Flag())
    def function(size, of=None, *, by=None, fast=False, other=1):
        return size, of, by, fast, other

    assert function(1e3, Path("a"), by={"x": 1, "y": None}, fast="true") == (
        1000,
        Path("a"),
        {"x": 1, "y": None},
        True,
        1,
    )
    assert function(2, None, by=None, other="any") == (2, None, None, False, "any")
    assert function.__name__ == "function"
    for wrong, said in (
        ({"size": None}, "size=None: expected a whole number of at least 1"),
        ({"size": 1, "of": "a"}, "of='a': expected a path"),
        ({"size": 1, "by": {"x": "1"}}, "expected numbers by name"),
        ({"size": 1, "by": {1: 1}}, "expected numbers by name"),
        ({"size": 1, "fast": None}, "fast=None: expected True or False"),
    ):
        with pytest.raises(ValueError, match=said):
            function(**wrong)
    with pytest.raises(TypeError, match="missing a required argument: 'size'"):
        function()
