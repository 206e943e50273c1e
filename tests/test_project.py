"""What keeps the project in one piece: pins, notebooks, imports."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIXED = {"jupyterlab", "ve-fairseq", "torch", "ipywidgets", "papermill"}


def pins(lines) -> dict[str, str]:
    """``name==version`` lines, names as the registry normalises them."""
    found = (re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in found if match}


def test_environment_project_and_locks_agree():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    declared = pins(PROJECT["project"]["dependencies"])
    torch = pins(re.findall(r"torch==\S+", (ROOT / "Makefile").read_text()))
    assert pins(pip) == declared | torch
    assert set(declared) | {"torch"} >= FIXED
    for lock in ("requirements.lock", "requirements-dev.lock"):
        locked = pins((ROOT / lock).read_text().splitlines())
        assert locked.items() >= declared.items()
        assert "torch" not in locked, "torch is installed by itself: its build depends on the machine"
    assert pins((ROOT / "requirements-dev.lock").read_text().splitlines()).items() >= (
        pins(PROJECT["dependency-groups"]["dev"]).items()
    )


def test_every_locked_package_has_hashes():
    for lock in ("requirements.lock", "requirements-dev.lock"):
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
    exec(tagged[0].source, {"__builtins__": {}}, values)  # literals only: no name can be looked up
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


def test_shipped_demo_is_small():
    files = subprocess.run(
        ["git", "ls-files", "moekit/demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert sum((ROOT / name).stat().st_size for name in files) < 20e6
