"""What keeps the project in one piece: pins, notebooks, imports."""

import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import tokenize
import tomllib
import urllib.request
from pathlib import Path

import grimp
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CLUSTER = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["cluster"]]
LOCKS = ("requirements.lock", "requirements-cluster.lock", "requirements-dev.lock")
FIXED = {"jupyterlab", "ve-fairseq", "torch", "ipywidgets", "papermill"}


def pins(lines) -> dict[str, str]:
    """``name==version`` lines, names as the registry normalises them."""
    found = (re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line.strip()) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def declared() -> dict[str, SpecifierSet]:
    """The packages of the core and of all notebooks, with the versions that they may have."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"] + extras["lab"] + extras["eval"]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


def test_environment_project_and_locks_agree():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    (torch,) = pins(re.findall(r"torch==\S+", (ROOT / "Makefile").read_text())).items()
    locked = pins((ROOT / "requirements.lock").read_text().splitlines())
    assert pip[-1] == "-e .[lab,eval]"
    assert pins(pip) == {name: locked[name] for name in declared() if name != "torch"} | dict([torch])
    assert set(declared()) >= FIXED
    for lock in LOCKS:
        found = pins((ROOT / lock).read_text().splitlines())
        assert found.items() >= locked.items()
        assert "torch" not in found, "torch is installed by itself: its build depends on the machine"
    assert pins((ROOT / "requirements-dev.lock").read_text().splitlines()).items() >= (
        pins(PROJECT["dependency-groups"]["dev"]).items()
    )
    cluster = pins((ROOT / "requirements-cluster.lock").read_text().splitlines())
    for needed in CLUSTER:
        assert cluster[canonicalize_name(needed.name)] in needed.specifier
    for name, allowed in declared().items():
        assert (locked | dict([torch]))[name] in allowed, name


def test_the_core_has_ranges_and_the_package_imports_what_it_declares():
    """A package that another environment already holds is not replaced; fairseq's is the one that results agree with."""
    exact = [line for line in PROJECT["project"]["dependencies"] if "==" in line]
    assert exact == ["ve-fairseq==0.12.3"]
    extras = [line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines]
    known = {*declared(), *(canonicalize_name(Requirement(line).name) for line in extras)}
    modules = {
        "lm_eval": "lm-eval",
        "fairseq": "ve-fairseq",
        "fairseq_cli": "ve-fairseq",
        "IPython": "jupyterlab",
        "traitlets": "ipywidgets",
        "torchaudio": "ve-fairseq",
    }
    # Of the bench and the kernels, which say what to do where it is missing, and a faster checksum.
    optional = {"triton", "isal", "pynvml"}
    # Layers that the bench compares with, if they are installed.
    optional |= {"triton_kernels", "vllm", "scattermoe", "megablocks"}
    graph = grimp.build_graph("moekit", include_external_packages=True, cache_dir=None)
    outside = {
        name
        for name in graph.modules
        if graph.is_module_squashed(name) and name not in sys.stdlib_module_names | optional
    }
    assert {"torch", "numpy", "fairseq"} <= outside
    assert {name for name in outside if modules.get(name, name) not in known} == set()


def test_a_comment_has_a_line_of_its_own():
    """In the package; what a tool reads at a line's end (noqa, type, pragma, fmt) may stand there."""
    found = []
    for path in sorted((ROOT / "moekit").rglob("*.py")):
        with open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                behind = token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
                if behind and not re.match(r"#\s*(noqa|type:|pragma|fmt)", token.string):
                    found.append(f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}")
    assert found == []


def test_every_locked_package_has_hashes():
    for lock in LOCKS:
        for entry in re.split(r"\n(?=\S)", (ROOT / lock).read_text().strip()):
            assert "--hash=sha256:" in entry, entry.split()[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_as_they_should_be(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = dict.fromkeys(line.split(" = ")[0] for line in tagged[0].source.splitlines() if " = " in line)
    values: dict = {}
    # Literals only: no name can be looked up.
    exec(tagged[0].source, {"__builtins__": {}}, values)
    assert list(values) == list(names)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_importing_moekit_and_the_model_brings_neither_fairseq_nor_jupyter():
    code = (
        "import sys, moekit, moekit.nn.transformer, moekit.worker;"
        "print(*(m for m in ('fairseq', 'IPython', 'ipywidgets', 'jupyterlab', 'pandas', 'matplotlib', 'anywidget')"
        " if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("known", "code", "said"),
    [
        ([], 1, "nothing was checked, as no advisory data can be reached"),
        ([("a", "1.0", [])], 1, "1 of 2 packages looked up, 0 with known holes"),
        ([("a", "1.0", []), ("b", "2.0", [])], 0, "2 of 2 packages looked up, 0 with known holes"),
        ([("a", "1.0", [("CVE-1", ["1.1"])]), ("b", "2.0", [])], 1, "a 1.0: CVE-1, mended in 1.1"),
        ([("a", "1.0", [("CVE-1", [])]), ("b", "2.0", [])], 1, "a 1.0: CVE-1, mended in no version"),
    ],
)
def test_audit_passes_only_what_was_looked_up_and_has_no_hole(
    tmp_path, monkeypatch, capsys, known, code, said
):
    audit = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["main"]
    found = {
        "dependencies": [
            {"name": n, "version": v, "vulns": [{"id": i, "fix_versions": f} for i, f in holes]}
            for n, v, holes in known
        ]
        + [{"name": "c", "skip_reason": "not found"}]
    }
    done = subprocess.CompletedProcess([], 0, json.dumps(found) if known else "Traceback ...", "")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: done)
    (tmp_path / "lock").write_text("a==1.0 \\\n    --hash=sha256:0\nb==2.0 \\\n    --hash=sha256:1\n")
    assert audit(str(tmp_path / "lock")) == code
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_make_lab_opens_as_the_image_does(tmp_path):
    """On the page that leads on, and without a question about news."""
    # A make that runs the tests would have this one say which folder it enters.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    said = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/.ready", "lab"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60, "check": True},
        env=outside,
    ).stdout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--allow-root"]
    command = [*shlex.split(said.replace("\\\n", " ")), *options]
    command[0] = str(Path(sys.executable).with_name("jupyter"))
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | folders | {"JUPYTER_TOKEN": "token"}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/?token=token", timeout=30) as page:
            assert page.url == f"http://127.0.0.1:{port}/lab/tree/README.ipynb?token=token"
        name = "@jupyterlab/apputils-extension:notification"
        url = f"http://127.0.0.1:{port}/lab/api/settings/{name}?token=token"
        with urllib.request.urlopen(url, timeout=30) as answer:
            settings = json.load(answer)["schema"]["properties"]
        chosen = {key: settings[key]["default"] for key in ("fetchNews", "checkForUpdates")}
        assert chosen == json.loads((ROOT / "docker/jupyter/overrides.json").read_text())[name]
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def test_what_running_notebooks_leaves_is_ignored():
    left = [
        "notebooks/out/run_inference/results.json",
        "notebooks/data/demo/data-bin/valid.bin",
        "out/x.ipynb",
    ]
    done = subprocess.run(
        ["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == left


def test_shipped_demos_are_small():
    files = subprocess.run(
        ["git", "ls-files", "moekit/demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert sum((ROOT / name).stat().st_size for name in files) < 24e6
