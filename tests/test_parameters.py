from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from test_project import ROOT

import moekit
from moekit.arguments import Choice, Flag, Number, Text, Texts, Whole
from moekit.notebook import models, parameters
from moekit.notebook.parameters import Location, Locations, Numbers, Pairs, ParameterError, check


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


def test_the_users_own_variables_are_no_parameters():
    """Those of an IPython startup file stand in no cell; those of a cell count where they are close to a parameter."""
    kinds = {"world_size": Whole(), "texts": Texts(optional=True)}
    own = {"world_size": 1, "texts": None, "DATA_DIR": "/data", "text": "mine", "In": ["", "world_size = 1"]}
    assert check(own, kinds).world_size == 1
    with pytest.raises(ParameterError, match="text is not a parameter.*did you mean texts"):
        check(own | {"In": ["", "world_size = 1", 'text = "mine"']}, kinds)
    assert check(own | {"In": ["", 'DATA_DIR = "/data"', "import os; x = os"]}, kinds).world_size == 1
    assert check(own | {"In": ["", "no Python ("]}, kinds).world_size == 1


def test_what_papermill_injected_is_a_parameter_or_an_error():
    kinds = {"world_size": Whole()}
    given = {"world_size": 1, "colour": "red", "In": ["", "world_size = 1", '# Parameters\ncolour = "red"\n']}
    with pytest.raises(
        ParameterError, match="colour is not a parameter of this notebook: there are world_size"
    ):
        check(given, kinds)
    paths = dict.fromkeys(("PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH", "PAPERMILL_OUTPUT_DIR_PATH"), "x")
    cell = "# Parameters\n" + "".join(f'{name} = "x"\n' for name in paths)
    assert check({"world_size": 1, "In": ["", cell], **paths}, kinds).world_size == 1


@pytest.mark.parametrize(
    "given, meant",
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a']", ["a"]),
        ("[]", []),
        ("[a, b]", ["[a, b]"]),
        ("[1] says", ["[1] says"]),
        ("[1, 2]", ["[1, 2]"]),
    ],
)
def test_a_list_that_papermill_passes_as_text(given, meant):
    assert check({"prompts": given}, {"prompts": Texts()}).prompts == meant


def test_experts_by_layer_and_lists_of_numbers():
    kinds = {"mask": Pairs(optional=True), "fractions": Numbers()}
    for given in ({5: 8}, {"5": [8]}, [[5, 8]], "{5: 8}", "[[5, 8]]"):
        found = check({"mask": given, "fractions": "[0.25, 1]"}, kinds)
        assert found.mask == {5: [8]} and found.fractions == [0.25, 1.0]
    assert check({"mask": None, "fractions": 0.5}, kinds).fractions == [0.5]
    for wrong in (8, "all", {"a": 1}):
        with pytest.raises(ParameterError, match="mask=.*: expected experts by layer"):
            check({"mask": wrong, "fractions": 1}, kinds)


def test_a_path_for_each_name():
    kinds = {"data": Locations(optional=True), "domains": Locations(optional=True, one=True)}
    named = {"a": "~/x", "b": "demo"}
    for given in (named, str(named)):
        found = check({"data": given, "domains": given}, kinds)
        assert found.data == found.domains == {"a": str(Path("~/x").expanduser()), "b": "demo"}
    assert check({"data": None, "domains": "demo"}, kinds).domains == "demo"
    for wrong in ("demo", {}, ["x"], {"a": 1.5j}):
        with pytest.raises(ParameterError, match="data=.*: expected a path for each name"):
            check({"data": wrong, "domains": None}, kinds)
    with pytest.raises(
        ParameterError, match="domains=.*: expected the path of a folder, or a path for each name"
    ):
        check({"data": None, "domains": ["x"]}, kinds)


def test_labels_are_domains():
    given = {"domains": None, "In": ["", '# Parameters\nlabels = "x"\n'], "labels": "x"}
    with pytest.raises(ParameterError, match="labels is not a parameter.*did you mean domains"):
        check(given, {"domains": Texts(optional=True)})


def test_paths_are_expanded():
    home = Path.home()
    assert check({"bpe": "~/x"}, {"bpe": Location()}).bpe == str(home / "x")
    assert check({"bpe": Path("~/x")}, {"bpe": Location()}).bpe == str(home / "x")
    assert check({"bpe": "demo"}, {"bpe": Location()}).bpe == "demo"
    assert check({"bpe": 7}, {"bpe": Location()}).bpe == "7"
    assert check({"bpe": "~/x/*.pt"}, {"bpe": Location()}).bpe == str(home / "x" / "*.pt")
    with pytest.raises(
        ParameterError, match="bpe='file:///x': an address; expected the path of a file or folder"
    ):
        check({"bpe": "file:///x"}, {"bpe": Location()})
    for wrong in ("", " ", "a\0b", True, ["x"]):
        with pytest.raises(ParameterError, match="bpe=.*: expected the path of a file or folder"):
            check({"bpe": wrong}, {"bpe": Location()})


def test_the_tables_are_those_of_the_notebooks():
    """Each notebook's parameters cell assigns what its table names, in every notebook."""
    tables = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert tables >= {"README", "prepare_data", "load_shards", "run_inference", "inspect_routing"}
    for name in tables:
        cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
        [cell] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
        values: dict = {}
        exec(cell.source, values)
        del values["__builtins__"]
        table = getattr(parameters, name.upper())
        assert values.keys() == table.keys()
        assert vars(check(values, table)) == values
        first = next(c for c in cells[cells.index(cell) + 1 :] if c.cell_type == "code")
        assert f"p = parameters.check(globals(), parameters.{name.upper()})" in first.source


def test_jupyter_shows_one_sentence():
    assert ParameterError("x=0: expected 1")._render_traceback_() == ["ParameterError: x=0: expected 1"]


def test_a_notebook_may_be_run_again_in_its_kernel():
    """Its own variables are no parameters, however close; those that are get checked as ever."""
    kinds = {"world_size": Whole(), "texts": Texts(optional=True)}
    variables = {"world_size": 1, "texts": None, "In": ["", "world_size = 1"]}
    variables |= {"p": check(variables, kinds), "text": "demo", "how": {}, "world_size": 2}
    variables["In"] = [*variables["In"], 'text = "demo"']
    assert check(variables, kinds).world_size == 2
    with pytest.raises(ParameterError, match="world_size='two'"):
        check(variables | {"world_size": "two"}, kinds)


def test_an_earlier_runs_models_are_closed():
    model = moekit.load("demo", 1, "cpu", progress=False)
    models.close_earlier({"model": model, "text": "demo", "kind": moekit.Model})
    with pytest.raises(RuntimeError, match="closed"):
        model.score("Gone.")


@pytest.mark.parametrize("experts", [None, "int8"])
def test_the_headers_are_read_once_unless_something_is_asked_of_experts(monkeypatch, experts):
    seen, survey = [], models.ckpt.survey
    monkeypatch.setattr(models.ckpt, "survey", lambda *files: seen.append(files) or survey(*files))
    names = ("world_size", "device", "dtype", "bpe", "ranks", "gpu_memory", "resident")
    p = SimpleNamespace(
        **dict.fromkeys(names) | {"checkpoint": "demo-dense", "device": "cpu", "dtype": "auto"},
        experts=experts,
    )
    with models.load(p, progress=False) as model:
        assert model.experts is None and len(seen) == (1 if experts is None else 2)


class Shell:
    """What IPython does with a handler of errors."""

    def __init__(self):
        self.shown = []

    def set_custom_exc(self, kinds, handler):
        self.kinds, self.handler = kinds, handler

    def showtraceback(self, error, tb_offset=None):
        render = getattr(error[1], "_render_traceback_", lambda: ["a traceback"])
        self.shown += render()

    def run(self, code):
        try:
            code()
        except self.kinds as error:
            self.handler(self, type(error), error, error.__traceback__, tb_offset=1)
            assert not hasattr(error, "_render_traceback_")


def test_errors_of_moekit_take_one_line(monkeypatch):
    shell = Shell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    check({}, {})

    def rank_error():
        raise moekit.RankError(1, "raised KeyError: 3")

    shell.run(lambda: moekit.load("/nowhere"))
    shell.run(rank_error)
    assert shell.shown[0].startswith("ValueError: /nowhere does not exist")
    assert shell.shown[1] == "RankError: rank 1 raised KeyError: 3"


def test_other_errors_keep_their_traceback(monkeypatch):
    shell = Shell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    check({}, {})
    shell.run(lambda: int("x"))
    shell.run(lambda: open("/nowhere"))
    assert shell.shown == ["a traceback"] * 2


def test_the_study_draws_enough_for_its_tests_to_mark_something():
    """Fewer would end the run in the cell of the test, after the text was read."""
    kind = parameters.STUDY_ROUTING["resamples"]
    assert parameters.parameter("resamples", 19, kind) == 19
    with pytest.raises(
        parameters.ParameterError, match="resamples=18: expected a whole number of at least 19"
    ):
        parameters.parameter("resamples", 18, kind)


def test_long_work_in_a_notebook_shows_a_bar(monkeypatch):
    """With a released model each of these takes minutes. README.ipynb, on the demo, does not."""
    import moekit.tasks
    from moekit.notebook import task_report

    for path in (ROOT / "notebooks").glob("*.ipynb"):
        code = "".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        silent = "progress=False" in code or '"progress": False' in code
        assert silent == (path.name == "README.ipynb"), path.name
        if "quantisation(" in code:
            assert "progress=True" in code, "by default it is silent"
    asked = []
    monkeypatch.setattr(moekit.tasks, "evaluate_tasks", lambda *_, **how: asked.append(how))
    monkeypatch.setattr(task_report, "score_domains", lambda *_, **how: asked.append(how))
    p = SimpleNamespace(
        tasks=["a"], task_data=None, limit=None, num_fewshot=None, domains="demo", subset="valid"
    )
    task_report.tasks(p, None)
    p.tokens_per_sample = p.max_batches = None
    task_report.domains(p, None, [])
    assert len(asked) == 2 and all(how.get("progress", True) for how in asked)
