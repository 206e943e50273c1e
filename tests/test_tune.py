"""``python -m moekit.bench tune``: the search with fake clocks, and whole runs under Triton's interpreter."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"
# Triton reads it on import.
os.environ[INTERPRET] = "1"
pytest.importorskip("triton")

import moekit
from moekit import checkpoint, versions
from moekit.bench import __main__ as bench
from moekit.bench import measure, tune
from moekit.bench.measure import Ceilings
from moekit.bench.setting import Setting
from moekit.handle import describe_run
from moekit.nn.kernels import cuts
from moekit.nn.kernels.cuts import ANY, Blocks, Cut, built_in, cut_for, why_not
from moekit.paths import DEMO_MODEL
from moekit.ranks import machine

os.environ.pop(INTERPRET, None)  # other tests know nothing of it

CPU = torch.device("cpu")
SHARED = 227 * 1024
START = Cut(ANY, ANY, Blocks(64, 128, 64, 4, 3), Blocks(64, 128, 64, 4, 3))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two bands, ceilings that nobody measures, and Triton's interpreter; nothing is remembered of a table."""
    monkeypatch.setenv(INTERPRET, "1")
    monkeypatch.delenv("MOEKIT_CUTS", raising=False)
    monkeypatch.setattr(tune, "BANDS", ((16, None), (None, None)))
    monkeypatch.setattr(tune, "MANY", 4)
    monkeypatch.setattr(measure, "ceilings", lambda rank, dtype: Ceilings(1e9, 1e9, 1e9, "none"))
    yield
    for remembered in (versions.own_cuts, cuts.cuts_of):
        remembered.cache_clear()


def search(clock, tries=500, seconds=60.0, start=START):
    return tune.search(start, clock, "float16", SHARED, tries, seconds)


# ---------------------------------------------------------------------------------------------- with fake clocks


def test_neighbours_are_one_step_away_and_possible():
    near = list(tune.neighbours(START, "float16", SHARED))
    assert len(near) == len(set(near)) and START not in near
    assert not any(why_not(cut, "float16", SHARED) for cut in near)
    for cut in near:
        both = [(getattr(START, p), getattr(cut, p)) for p in ("up", "down")]
        changed = [{n for n in vars(a) if getattr(a, n) != getattr(b, n)} for a, b in both]
        assert changed[0] == changed[1] <= {"rows", "warps"} or sorted(map(len, changed)) == [0, 1]
    assert replace(START, up=replace(START.up, columns=256, warps=4)) in near
    assert replace(START, down=replace(START.down, stages=4)) in near
    assert Cut(ANY, ANY, Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 3)) in near


def test_what_has_no_room_is_no_neighbour():
    near = list(tune.neighbours(START, "float16", 80 * 1024))
    assert near and not any(cuts.too_large(cut, "float16", 80 * 1024) for cut in near)
    assert replace(START, up=replace(START.up, stages=4)) not in near


def cost(cut: Cut) -> float:
    """The more a product is like 128 x 256 x 32 with 8 warps, the less time it takes."""
    best = {"rows": 128, "columns": 256, "inner": 32, "warps": 8}
    parts = [
        max(getattr(b, n), v) / min(getattr(b, n), v) for b in (cut.up, cut.down) for n, v in best.items()
    ]
    return sum(parts) + abs(cut.up.stages - 2) + abs(cut.down.stages - 2)


def test_the_best_cut_is_found():
    found = search(cost)
    assert found.cut == Cut(ANY, ANY, Blocks(128, 256, 32, 8, 2), Blocks(128, 256, 32, 8, 2))
    assert found.seconds == cost(found.cut) < found.before == cost(START)
    assert found.wrong == found.failed == 0


def test_a_wrong_cut_does_not_count_even_if_it_is_the_fastest():
    def clock(cut):
        if cut.up.columns == 256:
            raise ValueError("a cut computes something else than the loop")
        if cut.down.inner == 32:
            raise RuntimeError("out of resource")
        return cost(cut)

    found = search(clock)
    assert found.cut.up == Blocks(128, 128, 32, 8, 2) and found.cut.down == Blocks(128, 256, 64, 8, 2)
    assert found.wrong > 0 and found.failed > 0
    note = found.figure("a band", 1.0).note
    assert f"{found.wrong} wrong" in note and f"{found.failed} failed" in note


def test_a_built_in_cut_that_is_wrong_ends_it():
    def clock(cut):
        raise ValueError("a cut computes something else")

    with pytest.raises(ValueError, match="something else"):
        search(clock)


def test_noise_changes_nothing():
    calls = iter([1.0, *[0.99, 0.985] * 500])
    assert search(lambda cut: next(calls)).cut == START
    # A cut that was faster once, and is not when both are measured again, side by side.
    again = iter([1.0, 0.5, *[1.0] * 500])
    found = search(lambda cut: next(again))
    assert found.cut == START and found.seconds == found.before == 1.0


def test_tries_and_time_end_the_search():
    tried = []
    found = search(lambda cut: tried.append(cut) or 1.0, tries=5)
    assert found.tried == 5 and len(tried) == 6 and len(set(tried)) == 6
    found = search(cost, seconds=0)
    assert found.tried == 0 and found.cut == START


# ------------------------------------------------------------------------------------------------------- whole runs


def run(folder, *arguments: str, out: str = "own.json", figures=None) -> list[dict]:
    path = figures or folder / "figures.json"
    how = ["--device", "cpu", "--dtype", "float16", "--repeats", "1", "--tries", "1"]
    bench.main(["tune", *how, *arguments, "--out", str(folder / out), "--json", str(path)])
    return json.loads(path.read_text())["benches"]["tune"]


def fake_clock(monkeypatch, seconds=cost):
    """Results are computed and checked, and times are made up."""
    monkeypatch.setattr(tune, "captured", lambda work, device: work.args[-1])
    monkeypatch.setattr(measure, "seconds", lambda cut, device, **how: [seconds(cut)])


def test_a_table_is_made_written_and_used(tmp_path, monkeypatch, capfd):
    fake_clock(monkeypatch, lambda cut: 1.0 / cut.up.rows)
    rows = run(tmp_path, "--shape", "tiny")
    assert [row["work"] for row in rows[3:]] == ["up to 16 choices", "more choices an expert", "table"]
    assert all(row["figure"] > 0 and row["limit"] > 0 for row in rows[3:5])
    path = tmp_path / "own.json"
    assert rows[5]["note"] == f"interpreter, float16; to use it: export MOEKIT_CUTS={path}"
    assert "tuning float16" in capfd.readouterr().err

    own = cuts.tables(path.read_text(), "x")["interpreter"]["float16"]
    few, many = (cut_for(n, 16, built_in("interpreter", "float16")) for n in (16, 64))
    assert [cut.up.rows for cut in own] == [2 * few.up.rows, 2 * many.up.rows]
    assert [(cut.choices, cut.mean) for cut in own] == [(16, ANY), (ANY, ANY)]
    assert cuts.made(path.read_text())["interpreter"]["float16"]["shape"] == "tiny"

    # Another type of the same GPU is added; what is there stays, also where the shell leaves ~ as it is.
    monkeypatch.setenv("HOME", str(tmp_path))
    run(Path("~"), "--shape", "tiny", "--experts", "int8", figures=tmp_path / "figures.json")
    both = cuts.tables(path.read_text(), "x")["interpreter"]
    assert both["float16"] == own and set(both) == {"float16", "int8"}

    monkeypatch.setenv("MOEKIT_CUTS", str(path))
    for remembered in (versions.own_cuts, cuts.cuts_of):
        remembered.cache_clear()
    assert cuts.cuts_of(CPU, "float16") == own


def test_the_shape_may_be_a_checkpoints(demo_config):
    arguments = bench.parsers()[0].parse_args(["tune", "--device", "cpu", "--checkpoint", "demo"])
    assert tune._config(Setting.of(arguments), "demo") == demo_config


@pytest.fixture
def demo_config():
    return checkpoint.survey(checkpoint.find(DEMO_MODEL)).config


def test_a_wrong_result_is_found_in_a_run(tmp_path, monkeypatch):
    fake_clock(monkeypatch, lambda cut: 1.0 / cut.up.rows)
    whole = tune.product

    def product(experts, x, assignment, cut):
        found = whole(experts, x, assignment, cut)
        return found if cut.up.rows == 16 else found * 1.05

    monkeypatch.setattr(tune, "product", product)
    rows = run(tmp_path, "--shape", "tiny")
    own = cuts.tables((tmp_path / "own.json").read_text(), "x")["interpreter"]["float16"]
    assert all(cut.up.rows == 16 for cut in own)
    assert all("1 tried, 1 wrong" in row["note"] for row in rows[3:5])


def test_times_are_measured(tmp_path):
    rows = run(tmp_path, "--shape", "tiny", "--seconds", "1")
    assert rows[3]["figure"] > 0 and (tmp_path / "own.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "16b"], "invalid choice: '16b'"),
        (["--tries", "0"], "expected a whole number of at least 1"),
        (["--seconds", "-1"], "expected a whole number of at least 1"),
        (["--shape", "tiny", "--checkpoint", "demo"], "not allowed with"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.json").write_text("{}")
    monkeypatch.setattr(measure, "ceilings", None)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--shape", "tiny")
    error = capsys.readouterr().err
    assert "own.json: found no table of cuts" in error and error.count("\n") == 1
    assert (tmp_path / "own.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["own.json", "figures.json"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys, name):
    """The socket stands for a pipe, which would be waited for; to open it is an error at once, so that this test never waits."""
    monkeypatch.setattr(measure, "ceilings", None)
    path = tmp_path / name

    def refused(said: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, "--shape", "tiny")
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        path.unlink()

    os.mknod(path, stat.S_IFSOCK | 0o600)
    refused(f"{name} is a device, a pipe or a socket, which no file replaces")
    path.symlink_to(path)
    refused("its links lead round in a circle")
    # Into a folder that nobody can write into: --out follows the link, and --json would replace it.
    path.symlink_to("/proc/self/nowhere")
    refused("nothing can be written there" if name == "own.json" else "which no file replaces")


def test_a_machine_without_kernels_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(INTERPRET)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--shape", "tiny")
    assert "backend='triton' needs the package triton and a GPU" in capsys.readouterr().err


def test_what_does_not_fit_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "host_memory", lambda what: 1 << 30)
    (row,) = run(tmp_path, "--shape", "52b")
    assert row["figure"] is None and row["note"].startswith(
        "does not fit: 8.1 GiB of a layer and its rows, 1.0"
    )


def test_a_damaged_table_ends_every_bench_in_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.json").write_text("{}")
    monkeypatch.setenv("MOEKIT_CUTS", str(tmp_path / "own.json"))
    how = ["--shape", "tiny", "--device", "cpu", "--backend", "triton", "--repeats", "1"]
    for name in (["score", "--blocks", "1"], ["moe-layer", "--tokens", "4"]):
        with pytest.raises(SystemExit, match="2"):
            bench.main([*name, *how])
        error = capsys.readouterr().err
        assert f"MOEKIT_CUTS={tmp_path}/own.json: found no table" in error and error.count("\n") == 1


def test_a_dense_model_has_no_cuts(tmp_path):
    (row,) = run(tmp_path, "--shape", "dense-tiny")
    assert row["note"] == "the model is dense, it has no layer with experts"


# -------------------------------------------------------------------------------------------------- with a model


def test_a_model_says_which_cuts_it_has(tmp_path, monkeypatch):
    how = {"device": "cpu", "backend": "triton", "progress": False}
    path = tmp_path / "own.json"
    # Every part of a matrix takes several programs and several steps.
    small = Cut(ANY, ANY, Blocks(16, 32, 32, 1, 2), Blocks(16, 64, 64, 2, 2))
    path.write_text(cuts.written({"interpreter": {"float32": (small,)}}, {}))
    text = "One."
    with moekit.load("demo", world_size=1, **how) as model:
        assert model.parts[0]["cuts"] == model.versions["cuts"] == "built-in"
        expected = model.score(text).logprob
    monkeypatch.setenv("MOEKIT_CUTS", str(path))
    for remembered in (versions.own_cuts, cuts.cuts_of):
        remembered.cache_clear()
    with moekit.load("demo", world_size=1, **how) as model:
        assert model.versions["cuts"].startswith("own.json, SHA-256 ")
        assert describe_run(model, [], None, 1)["versions"] == model.versions
        assert model.score(text).logprob.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    with moekit.load("demo", world_size=1, device="cpu", backend="loop", progress=False) as model:
        assert model.versions["cuts"] is None, "the plain path has none"
    path.write_text("{")
    for remembered in (versions.own_cuts, cuts.cuts_of):
        remembered.cache_clear()
    with pytest.raises(Exception, match="MOEKIT_CUTS=.*own.json: found no table of cuts"):
        moekit.load("demo", world_size=1, **how)
    assert os.environ["MOEKIT_CUTS"] == str(path)
