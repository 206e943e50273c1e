import pytest

import moekit
from moekit.arguments import Choice, Flag, Number, ParameterError, Text, Texts, Whole
from moekit.notebook.parameters import check


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        (Text(), "demo", "demo"),
        (Text(), 7, "7"),
        (Whole(), 4, 4),
        (Whole(), 1e3, 1000),
        (Whole(0), 0, 0),
        (Whole(optional=True), "None", None),
        (Number(optional=True), None, None),
        (Number(), 1, 1.0),
        (Flag(), "true", True),
        (Flag(), False, False),
        (Choice(("a", "b")), "b", "b"),
        (Texts(), "one", ["one"]),
        (Texts(), ["one", "two"], ["one", "two"]),
    ],
)
def test_what_papermill_passes_is_understood(kind, given, meant):
    checked = check({"x": given}, {"x": kind})
    assert checked.x == meant
    assert type(checked.x) is type(meant)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Whole(), 0),
        (Whole(), 1.5),
        (Whole(), True),
        (Whole(), "4"),
        (Whole(), None),
        (Whole(), float("inf")),
        (Number(), float("nan")),
        (Number(least=0), -1),
        (Flag(), "yes"),
        (Choice(("a", "b")), "c"),
        (Text(), None),
        (Texts(), [1]),
    ],
)
def test_what_makes_no_sense_is_named(kind, given):
    with pytest.raises(ParameterError, match="^x=.*: expected"):
        check({"x": given}, {"x": kind})


def test_a_misspelt_or_missing_parameter_is_named():
    kinds = {"world_size": Whole()}
    with pytest.raises(ParameterError, match="wrld_size is not a parameter.*did you mean world_size"):
        check({"world_size": 1, "wrld_size": 4}, kinds)
    with pytest.raises(ParameterError, match="world_size is missing"):
        check({}, kinds)
    assert check({"world_size": 1, "_hidden": 2, "In": [], "exit": object()}, kinds).world_size == 1


def test_jupyter_shows_one_sentence():
    assert ParameterError("x=0: expected 1")._render_traceback_() == ["ParameterError: x=0: expected 1"]


def test_a_notebook_may_be_run_again_in_its_kernel():
    """Its own variables are no parameters; those that are get checked as ever, and models are closed."""
    kinds = {"world_size": Whole()}
    variables = {"world_size": 1}
    variables |= {"p": check(variables, kinds), "text": "demo", "how": {}, "world_size": 2}
    variables["model"] = model = moekit.load("demo", 1, "cpu", progress=False)
    assert check(variables, kinds).world_size == 2
    with pytest.raises(RuntimeError, match="closed"):
        model.score("Gone.")
    with pytest.raises(ParameterError, match="world_size='two'"):
        check(variables | {"world_size": "two"}, kinds)
