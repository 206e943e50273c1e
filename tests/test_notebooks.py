"""The notebooks, run headless as a user does."""

import json
import subprocess
import sys

import nbformat
import pandas as pd
import papermill
import pytest
from nbclient import NotebookClient
from test_project import ROOT

import moekit

pytestmark = pytest.mark.slow


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory that has nothing to do with the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(name: str, folder, **parameters) -> None:
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        folder / f"{name}.ipynb",
        parameters=parameters,
        progress_bar=False,
        start_timeout=180,
        execution_timeout=600,
    )


def outputs(path) -> list:
    cells = nbformat.read(path, as_version=4).cells
    return [out for cell in cells for out in cell.get("outputs", [])]


def test_run_inference_on_four_ranks_equals_one(elsewhere):
    execute("run_inference", elsewhere, world_size=4, max_batches=20, max_new_tokens=5, output_dir="results")
    found = json.loads((elsewhere / "results" / "results.json").read_text())
    tokens = pd.read_parquet(elsewhere / "results" / "tokens.parquet")
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        expected = model.evaluate("demo", max_batches=20, progress=False)
    assert found["world_size"] == 4
    assert found["loss_base2"] == pytest.approx(expected.loss_base2, abs=1e-5)
    assert found["ntokens"] == expected.ntokens == len(tokens)
    pd.testing.assert_frame_equal(tokens, expected.tokens, atol=1e-4, rtol=0)
    names = {"dtype", "device", "load_seconds", "versions", "perplexity", "tokens_per_second"}
    assert names <= set(found)
    loud = [out for out in outputs(elsewhere / "run_inference.ipynb") if out.get("name") == "stderr"]
    assert not loud, "what a progress bar leaves is its last state, not a line for every step"
    assert {"loss_by_position.png", "passage.png"} <= {p.name for p in (elsewhere / "results").iterdir()}


def test_the_study_finds_what_is_known_of_the_demo(elsewhere):
    execute("study_routing", elsewhere, device="cpu", output_dir="results")
    results = elsewhere / "results"
    survive = pd.read_csv(results / "survive.csv").set_index("layer")["survive"]
    assert survive.loc[[1, 3]].tolist() == [7, 15] and 12 <= survive[5] <= 16
    told = pd.read_csv(results / "told.csv").set_index(["of", "layer"])["share"]
    assert told["token"].tolist() == pytest.approx([0.92, 0.84, 0.59], abs=0.01)
    assert (told["position"] < 0.001).all()
    lost = pd.read_csv(results / "lost.csv").set_index("domain")
    assert lost.loc["german", "change"] == pytest.approx(-0.86, abs=0.01)
    assert lost.loc["german", "low"] < -0.9 and lost.loc["german", "high"] > -0.82
    assert (lost.loc[["french", "english"], "p"] > 0.5).all()
    costs = pd.read_csv(results / "costs.csv").set_index(["capacity", "domain"])["perplexity_ratio"]
    assert costs["capacity 0.25", "german"] == pytest.approx(2.08, abs=0.02)
    assert costs["capacity 0.25", "manual"] == pytest.approx(1.10, abs=0.01)
    assert {"specialisation.pdf", "capacity.png", "pairs.tex", "settings.csv"} <= {
        p.name for p in results.iterdir()
    }
    for out in outputs(elsewhere / "study_routing.ipynb"):
        said = out.get("text", "") + out.get("data", {}).get("text/plain", "")
        assert "%|" not in said and str(elsewhere) not in said and out.get("name") != "stderr"


def test_load_shards_at_three_ranks(elsewhere):
    execute("load_shards", elsewhere, world_size=3, experts="int8", output_dir="results")
    shares = pd.read_csv(elsewhere / "results" / "shares.csv")
    assert set(shares["experts' type"]) == {"int8"}
    assert shares["experts a layer"].tolist() == ["0 to 4", "5 to 9", "10 to 15"]
    assert (elsewhere / "results" / "filled.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"world_size": "many"}, "world_size='many': expected a whole number of at least 1 or None"),
        ({"wrld_size": 4}, "wrld_size is not a parameter of this notebook: did you mean world_size?"),
        ({"bpe": "/nowhere"}, "text needs encoder.json, vocab.bpe, dict.txt, expected in /nowhere"),
        ({"subset": "bogus"}, "has no bogus.bin"),
    ],
)
def test_a_bad_parameter_fails_in_the_first_cell_with_one_sentence(elsewhere, parameters, said):
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        execute("run_inference", elsewhere, **parameters)
    [line] = caught.value.traceback
    assert line.startswith("ParameterError: ") and said in line
    assert caught.value.exec_count <= 3


def test_paths_that_papermill_injects_and_variables_of_the_users_own(elsewhere, monkeypatch):
    startup = elsewhere / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text('DATA_DIR = "/data"; text = "mine"; device = "a default of mine"\n')
    monkeypatch.setenv("IPYTHONDIR", str(elsewhere / "ipython"))
    command = [sys.executable, "-m", "papermill", "--inject-paths", "--no-progress-bar"]
    names = [ROOT / "notebooks" / "load_shards.ipynb", "out.ipynb"]
    ran = subprocess.run([*command, *names], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def test_moekits_errors_after_the_first_cell_take_one_line(elsewhere):
    cells = [
        "import moekit\nfrom moekit.notebook import parameters\np = parameters.check(globals(), {})",
        'moekit.load("/nowhere")',
        "def broken(rank):\n    raise KeyError(3)",
        'model = moekit.load("demo", 2, "cpu", progress=False)\nmodel.ranks.call(broken)',
        'int("x")',
        "%tb",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(
        notebook, timeout=300, allow_errors=True, resources={"metadata": {"path": str(elsewhere)}}
    )
    client.execute()
    errors = [
        [out.traceback for out in cell.outputs if out.output_type == "error"] for cell in notebook.cells
    ]
    [[nowhere]], [[rank]], [own] = errors[1], errors[3], errors[4]
    assert nowhere.startswith("ValueError: /nowhere does not exist") and "\n" not in nowhere
    assert rank.startswith("RankError: rank 0 raised KeyError: 3")
    assert len(own) > 1 and "int(" in "".join(own)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("run_inference", {"max_batches": 2, "max_new_tokens": 3, "experts": "int8"}),
        ("load_shards", {}),
        ("inspect_routing", {"max_tokens": 1500, "experts": "fp8"}),
        ("prepare_data", {}),
    ],
)
def test_all_cells_may_be_run_again_in_the_same_kernel(name, parameters, elsewhere):
    notebook = papermill.iorw.load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
    notebook = papermill.parameterize.parameterize_notebook(notebook, parameters)
    again = [nbformat.v4.new_code_cell(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells += again
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(elsewhere)}}).execute()
    assert all(cell.execution_count for cell in again)
