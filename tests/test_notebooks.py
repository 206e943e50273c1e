"""The notebooks, run headless as a user does."""

import gzip
import json
import subprocess
import sys

import nbformat
import pandas as pd
import papermill
import pytest
import trace_format
from nbclient import NotebookClient
from test_project import ROOT

import moekit
from moekit.profiling import Profile

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
    lines = (elsewhere / "results" / "generations.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        expected = model.evaluate("demo", max_batches=20, progress=False)
        asked = found["parameters"]
        how = {name: asked[name] for name in ("max_new_tokens", "temperature", "top_p", "seed")}
        written = model.generate(asked["prompts"], **how, progress=False)
    assert [text["prompt"] for text in texts] == asked["prompts"] and len(texts) == len(written)
    for text, one in zip(texts, written, strict=True):
        assert (text["text"], text["ids"], text["finish_reason"]) == (one.text, one.ids, one.finish_reason)
        assert text["logprobs"] == pytest.approx(one.logprobs.tolist(), abs=1e-4) and len(one.ids) == 5
        assert text["score"] == pytest.approx(one.score, abs=1e-4)
    assert found["world_size"] == 4
    assert found["loss_base2"] == pytest.approx(expected.loss_base2, abs=1e-5)
    assert found["ntokens"] == expected.ntokens == len(tokens)
    pd.testing.assert_frame_equal(tokens, expected.tokens, atol=1e-4, rtol=0)
    names = {"dtype", "device", "load_seconds", "versions", "perplexity", "tokens_per_second"}
    assert names <= set(found)
    loud = [out for out in outputs(elsewhere / "run_inference.ipynb") if out.get("name") == "stderr"]
    assert not loud, "what a progress bar leaves is its last state, not a line for every step"
    said = [out.get("data", {}).get("text/plain", "") for out in outputs(elsewhere / "run_inference.ipynb")]
    assert not any("%|" in text for text in said), "a finished bar leaves nothing beside a result"
    assert {"loss_by_position.png", "passage.png"} <= {p.name for p in (elsewhere / "results").iterdir()}


def test_what_one_byte_costs_is_told_of_the_samples_that_were_scored(elsewhere):
    """The samples of another break mode than "none" are other ones, and so are those with context."""
    how = {"sample_break_mode": "complete_doc", "tokens_per_sample": 100, "context_window": 20}
    how |= {"max_batches": 7, "experts": "int8", "prompts": []}
    execute("run_inference", elsewhere, **how, output_dir="results")
    scored = pd.read_parquet(elsewhere / "results" / "tokens.parquet")
    said = [out.get("data", {}).get("text/plain", "") for out in outputs(elsewhere / "run_inference.ipynb")]
    [change] = [text for text in said if "its 95 % interval over samples" in text]
    told = dict(line.rsplit(maxsplit=1) for line in change.split("\n") if line.strip())
    assert told["tokens"] == f"{len(scored):,}"
    assert told["samples"] == str(scored["sample"].nunique()) == "7"


def test_what_a_bar_leaves_is_removed_and_a_warning_stays():
    cell = nbformat.v4.new_code_cell(
        "import warnings\n"
        "from moekit import progress\n"
        "from moekit.notebook import pictures\n"
        "with progress.bar('reading', 2, ' tokens') as bar:\n"
        "    bar.update(2)\n"
        "warnings.warn('look here')\n"
        "pictures.clear_progress()\n"
        "7"
    )
    NotebookClient(nbformat.v4.new_notebook(cells=[cell]), startup_timeout=180).execute()
    said = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    assert "look here" in "".join(said) and said[-1] == "7"
    assert not any("reading" in text for text in said)


def test_a_dense_model_is_a_checkpoint_like_any_other(elsewhere):
    execute("load_shards", elsewhere, checkpoint="demo-dense", world_size=2, output_dir="results")
    shares = pd.read_csv(elsewhere / "results" / "shares.csv")
    assert shares["files"].tolist() == ["model.pt"] * 2 and shares["experts a layer"].tolist() == ["none"] * 2
    how = {"max_batches": 2, "max_new_tokens": 3, "output_dir": "scored"}
    execute("run_inference", elsewhere, checkpoint="demo-dense", world_size=2, **how)
    found = json.loads((elsewhere / "scored" / "results.json").read_text())
    assert found["world_size"] == 2 and 3 < found["loss_base2"] < 6
    said = [out for out in outputs(elsewhere / "run_inference.ipynb") if out.get("name") == "stderr"]
    assert not said
    with pytest.raises(
        papermill.PapermillExecutionError, match="'demo-dense': the model is dense, it has no"
    ):
        execute("inspect_routing", elsewhere, checkpoint="demo-dense", output_dir="no")
    assert not (elsewhere / "no" / "trace.parquet").exists()


def test_the_study_has_60_lines():
    cells = nbformat.read(ROOT / "notebooks" / "study_routing.ipynb", 4).cells
    code = [
        cell.source
        for cell in cells
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
    ]
    assert sum(bool(line.strip()) for source in code for line in source.split("\n")) <= 60


def test_the_study_finds_what_is_known_of_the_demo(elsewhere):
    execute("study_routing", elsewhere, device="cpu", resident=4, output_dir="results")
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
    written = pd.read_csv(results / "written.csv").set_index("domain")
    german = written.loc["german"]
    assert (german["layer"], german["expert"], german["units"]) == (5, 8, 8)
    assert (
        german["read"] == pytest.approx(0.70, abs=0.01) and german["written"] > 0.5 > 5 * german["load"] - 0.3
    )
    assert {"choices.pdf", "written.png", "written.tex"} <= {p.name for p in results.iterdir()}
    for out in outputs(elsewhere / "study_routing.ipynb"):
        said = out.get("text", "") + out.get("data", {}).get("text/plain", "")
        assert "%|" not in said and str(elsewhere) not in said and out.get("name") != "stderr"


def test_where_the_time_goes_on_four_ranks(elsewhere):
    small = {"batch_blocks": [1, 2], "steps": 2, "capacity_token_fraction": 0.2}
    small |= {"experts": "int8", "resident": 2}
    execute("profile_inference", elsewhere, world_size=4, device="cpu", output_dir="results", **small)
    results = elsewhere / "results"
    found = Profile.load(results / "profile_2.json.gz")
    assert found.meta["world_size"] == 4 and found.meta["tokens"] == 2 * 256
    assert found.meta["experts"] == "int8" and found.meta["resident"] == 2
    # The shares of the table are those of the step that the clock of each rank measured.
    parts = pd.read_csv(results / "parts.csv").set_index("part")
    assert parts["seconds"].sum() == pytest.approx(found.profiled.mean(), rel=0.03)
    assert {
        "attention",
        "gate",
        "dispatch",
        "fetch",
        "experts up",
        "experts down",
        "combine",
        "waiting",
    } <= set(parts.index)
    assert (pd.read_csv(results / "experts.csv").groupby("layer")["rank"].count() == 4).all()
    saved = pd.read_csv(results / "saved.csv").set_index("placement")["saved of a step"]
    assert saved["contiguous"] == 0 and saved["fitted"] > 0
    held = trace_format.read(gzip.decompress((results / "trace.json.gz").read_bytes()))
    assert trace_format.problems(held) == []
    events = held["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert lanes == {f"rank {rank}: {what}" for rank in range(4) for what in ("host", "parts")}
    pictures = {"timeline", "parts", "experts", "roofline", "by_batch", "placements"}
    assert {f"{name}.png" for name in pictures} | {"timeline.html"} <= {p.name for p in results.iterdir()}
    for out in outputs(elsewhere / "profile_inference.ipynb"):
        assert out.get("name") != "stderr" and "error" not in out.get("output_type", "")


def test_evaluate_tasks_beside_a_baseline(elsewhere):
    """Sparse beside dense, which has no experts to quantise or to fetch; all that is shown is kept, too."""
    asked = {"max_batches": 10, "capacity_token_fractions": [0.25, 1.0], "mask": {5: [*range(14)]}}
    asked |= {"experts": "int8", "resident": 3}
    execute("evaluate_tasks", elsewhere, baseline="demo-dense", world_size=2, output_dir="results", **asked)
    results = elsewhere / "results"
    tasks = pd.read_csv(results / "tasks.csv").set_index(["task", "metric"])
    difference = tasks["value"] - tasks["value_baseline"]
    assert tasks["difference"].tolist() == pytest.approx(difference.tolist(), abs=1e-6)
    assert difference["demo_endings", "margin"] != 0 and tasks["paper"].isna().all()
    assert tasks.loc[("demo_endings", "acc"), ["value", "value_baseline"]].min() > 0.85
    mask = pd.read_csv(results / "mask.csv").set_index(["task", "metric"])
    assert mask.loc[("demo_endings", "margin"), "high"] < 0
    domains = pd.read_csv(results / "domains.csv")
    whole = domains[domains["domain"] == "(all)"].set_index(["model", "capacity"])["bits_per_token"]
    free = domains[domains["domain"].eq("(all)") & domains["capacity"].isna()]
    free = free.set_index("model")["bits_per_token"]
    assert set(free.index) == {"checkpoint", "baseline"}
    # A block with padding runs again at a capacity of 1, beside other rows.
    assert whole["checkpoint", 1.0] == pytest.approx(free["checkpoint"], abs=1e-7)
    assert free["checkpoint"] < whole["checkpoint", 0.25]
    differences = pd.read_csv(results / "domain_differences.csv").set_index("domain")
    assert differences.loc["(all)", "difference"] == pytest.approx(
        free["checkpoint"] - free["baseline"], abs=1e-9
    )
    assert differences["tokens"].sum() == 2 * differences.loc["(all)", "tokens"]
    assert not differences["note"].eq("other tokens").any()
    items = pd.read_parquet(results / "items.parquet")
    assert set(items["run"]) == {"checkpoint", "baseline", "masked"}
    run = json.loads((results / "run.json").read_text())
    assert run["parameters"]["world_size"] == 2 and run["runs"]["masked"]["intervention"]["mask"]
    assert {name: one["experts"] for name, one in run["runs"].items()} == {
        "checkpoint": "int8",
        "baseline": None,
        "masked": "int8",
    }
    assert {"tasks.png", "domains.png", "capacities.png", "changed.csv"} <= {
        p.name for p in results.iterdir()
    }
    for out in outputs(elsewhere / "evaluate_tasks.ipynb"):
        said = out.get("text", "") + out.get("data", {}).get("text/plain", "")
        assert "%|" not in said and out.get("name") != "stderr", said


def test_load_shards_at_three_ranks(elsewhere):
    execute("load_shards", elsewhere, world_size=3, experts="int8", resident=2, output_dir="results")
    memory = pd.read_csv(elsewhere / "results" / "memory.csv")
    assert memory["on the device"].tolist() == [2, 2, 2] and (memory["slots"] > 0).all()
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
        "def broken(rank):\n    if rank.rank == 0:\n        raise KeyError(3)",
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
        ("inspect_routing", {"max_tokens": 1500, "experts": "fp8", "capacity_token_fraction": 0.3}),
        ("profile_inference", {"checkpoint": "demo-dense", "batch_blocks": [1], "steps": 1}),
        ("prepare_data", {}),
        (
            "evaluate_tasks",
            {"limit": 4, "max_batches": 2, "capacity_token_fractions": [], "mask": None, "domains": None},
        ),
    ],
)
def test_all_cells_may_be_run_again_in_the_same_kernel(name, parameters, elsewhere):
    notebook = papermill.iorw.load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
    notebook = papermill.parameterize.parameterize_notebook(notebook, parameters)
    again = [nbformat.v4.new_code_cell(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells += again
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(elsewhere)}}).execute()
    assert all(cell.execution_count for cell in again)
